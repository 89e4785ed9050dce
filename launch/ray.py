"""Runs on a Ray cluster: `python -m launch.ray [flags] --config=configs/sft.py --config.<option>=value`."""

import sys

from realjax.apps.quickstart import main

if __name__ == "__main__":
    sys.exit(main(["launch", "ray", *sys.argv[1:]]))
