"""The installed commands `realjax` and `realjax-recipe`."""

from typing import NoReturn

from realjax.apps.start import begin


def main() -> NoReturn:
    """Runs an experiment from words `key=value` and ends the process."""
    begin()
    from realjax.apps import errors, quickstart

    errors.end_process(quickstart.main())


def run_recipe() -> NoReturn:
    """Runs an experiment from a recipe, `--config=...`, and ends the process."""
    begin()
    from realjax.apps import errors, recipe

    errors.end_process(recipe.main())
