"""Where a run keeps its files."""

import getpass
import os
import tempfile
from pathlib import Path

from realjax.dataflow.run import RunPaths
from realjax.options.common import CommonExperimentConfig


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
        return getpass.getuser()
    except (KeyError, OSError):
        # Containers often run under a number that has no name.
        return f"uid{os.getuid()}"
