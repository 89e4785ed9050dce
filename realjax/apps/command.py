"""The installed commands `realjax` and `realjax-recipe`."""

import signal
from typing import NoReturn


def main() -> NoReturn:
    """Runs an experiment from words `key=value` and ends the process."""
    _end_quietly_until_started()
    from realjax.apps import errors, quickstart

    errors.end_process(quickstart.main())


def run_recipe() -> NoReturn:
    """Runs an experiment from a recipe, `--config=...`, and ends the process."""
    _end_quietly_until_started()
    from realjax.apps import errors, recipe

    errors.end_process(recipe.main())


def _end_quietly_until_started() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports, which take seconds, has nothing to tell
