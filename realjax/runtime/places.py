"""Directories that a run relies on while it goes on."""

from pathlib import Path

from realjax.core.faults import removed


class Places:
    """Directories that must stay: one that was removed would be made again, and what it held be missed by nobody."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[int, int]] = {}

    def keep(self, directory: Path) -> None:
        """From now on `check` looks after this directory, which exists."""
        self._seen.setdefault(directory, _identity(directory))

    def check(self) -> None:
        """Raises FileNotFoundError for a directory that is gone, or another one of its name."""
        for directory, before in self._seen.items():
            if not directory.is_dir() or _identity(directory) != before:
                raise removed(directory)


def describe_saved(recover: Path) -> str:
    """Returns which of a run's states is safe, and how to go on."""
    # A save in the making has a longer name than its step.
    steps = [int(path.name) for path in recover.glob("*") if path.name.isdigit()]
    if not steps:
        return "nothing was saved before; give the command again once that is mended"
    return (
        f"step {max(steps)} is saved in {recover}; once that is mended, the same command with recover_mode=auto goes "
        "on from there"
    )


def _identity(directory: Path) -> tuple[int, int]:
    status = directory.stat()
    return status.st_dev, status.st_ino
