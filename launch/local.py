"""Starts a run in several processes here: `python -m launch.local --processes 2 --devices 4 -- sft key=value ...`."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports, which take seconds, has nothing to tell

import sys

from realjax.launch.local import main

if __name__ == "__main__":
    sys.exit(main())
