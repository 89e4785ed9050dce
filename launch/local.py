"""Starts a run in several processes here: `python -m launch.local --processes 2 --devices 4 -- sft key=value ...`."""

if __name__ == "__main__":
    from realjax.apps.start import begin

    begin()

import sys

from realjax.launch.local import main

if __name__ == "__main__":
    sys.exit(main())
