"""What an option names as `<module>:<name>`: a user's function or class; and how an error shows what that gave."""

import importlib
from typing import Any


def load_named(path: str, option: str, example: str) -> Any:
    """Returns what stands at `<module>:<name>`; ValueError, naming the option, where there is nothing."""
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name):
        raise ValueError(f"{option}: found {path!r}; it needs {example}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that is there and imports a missing one is another mistake.
        cause = "cannot be found" if module_name.startswith(error.name or " ") else f"needs '{error.name}'"
        raise ValueError(
            f"{option}: the module of {path!r} {cause}; install it, or add its folder to PYTHONPATH"
        ) from error
    except (Exception, SystemExit) as error:  # whatever its code does; sys.exit would end the run as if all were well
        found = f"{type(error).__name__}: {error}"
        raise ValueError(f"{option}: the module of {path!r} cannot be imported ({found}); mend it") from error
    return getattr(module, name, None)


def shorten(value: object, most: int = 80) -> str:
    """Returns what a value looks like, cut off where it is long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
