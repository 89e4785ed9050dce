"""Submits a run to Slurm: `python -m launch.slurm [flags] --config=configs/sft.py --config.<option>=value`."""

import sys

from realjax.apps.quickstart import main

if __name__ == "__main__":
    sys.exit(main(["launch", "slurm", *sys.argv[1:]]))
