"""Runs a recipe: `python -m launch.main --config=configs/sft.py --config.model.path=... --config.<option>=value`."""

if __name__ == "__main__":
    from realjax.apps.start import begin

    begin()

from realjax.apps.errors import end_process
from realjax.apps.recipe import main

if __name__ == "__main__":
    end_process(main())
