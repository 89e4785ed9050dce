"""The installed commands `realjax` and `realjax-recipe`."""

import signal


def main() -> int:
    """Runs an experiment from words `key=value` and returns its exit code."""
    _end_quietly_until_started()
    from realjax.apps import quickstart

    return quickstart.main()


def run_recipe() -> int:
    """Runs an experiment from a recipe, `--config=...`, and returns its exit code."""
    _end_quietly_until_started()
    from realjax.apps import recipe

    return recipe.main()


def _end_quietly_until_started() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports, which take seconds, has nothing to tell
