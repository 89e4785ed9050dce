"""Where a run keeps its files."""

import getpass
import os
import re
import tempfile
from pathlib import Path

from realjax.dataflow.run import RunPaths
from realjax.options.common import CommonExperimentConfig

# Of most file systems it is 255; a directory that is set aside has a longer name than its run.
LONGEST_NAME = 200


def find_fileroot(fileroot: str | None) -> Path:
    """Returns `fileroot`, else REALJAX_FILEROOT, else ~/.cache/realjax, absolute."""
    chosen = fileroot or os.environ.get("REALJAX_FILEROOT") or "~/.cache/realjax"
    return Path(chosen).expanduser().absolute()


def run_paths(config: CommonExperimentConfig) -> RunPaths:
    """Returns the directories of the run that `config`, with its names resolved, describes."""
    assert config.experiment_name and config.trial_name, "resolve_names comes first"
    root = find_fileroot(config.fileroot)
    run = Path(_user_name()) / config.experiment_name / config.trial_name
    return RunPaths(
        logs=root / "logs" / run,
        checkpoints=root / "checkpoints" / run,
        recover=root / "recover" / run,
        compilation_cache=root / ".cache" / "jax",
        plans=root / ".cache" / "plans",
    )


def token_cache(config: CommonExperimentConfig) -> Path:
    """Returns the directory in which the tokens of data are kept between runs."""
    return find_fileroot(config.fileroot) / ".cache" / "tokens"


def check_directory_name(name: str, value: str) -> None:
    """Raises ValueError, naming `name`, for text that is not the name of one directory, or that a terminal obeys."""
    fits = value.isprintable() and len(value.encode()) <= LONGEST_NAME
    if not fits or not re.fullmatch(r"[^\s/\\]+", value) or value in (".", ".."):
        found = value if len(value) <= LONGEST_NAME else f"{value[:20]}... ({len(value)} characters)"
        raise ValueError(
            f"{name}: found {found!r}; it names a directory, so it needs text without spaces, slashes and control "
            f"characters, of at most {LONGEST_NAME} bytes"
        )


def check_writable(paths: RunPaths) -> None:
    """Makes the run's log directory and writes to it; ValueError when that fails."""
    try:
        paths.logs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=paths.logs):
            pass
    except OSError as error:
        raise ValueError(
            f"fileroot: cannot write to {paths.logs} ({error.strerror}); set fileroot=... or REALJAX_FILEROOT to a "
            "directory of yours"
        ) from error


def _user_name() -> str:
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        # Containers often run under a number that has no name.
        return f"uid{os.getuid()}"
    # It comes from the environment, where anything may stand.
    check_directory_name("user name (LOGNAME, USER, LNAME or USERNAME)", name)
    return name
