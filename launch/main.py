"""Runs a recipe: `python -m launch.main --config=configs/sft.py --config.model.path=... --config.<option>=value`."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports, which take seconds, has nothing to tell

from realjax.apps.errors import end_process
from realjax.apps.recipe import main

if __name__ == "__main__":
    end_process(main())
