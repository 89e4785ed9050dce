"""The directories of a run: made, continued, or set aside so that nothing in them is overwritten."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from realjax.dataflow.run import RunSpec
from realjax.runtime.console import LOG_FORMAT, LOG_TIME_FORMAT
from realjax.runtime.metrics import import_wandb, replace_text
from realjax.runtime.processes import from_first, is_first

logger = logging.getLogger("realjax.rundir")
LOG_FILE = "run.log"


def open_run_directory(spec: RunSpec) -> bool:
    """Prepares the run's directories and returns whether it continues from a saved state there.

    A run that starts anew sets what an earlier run of the same names left aside, under `<trial>.<n>`.
    Raises ValueError when recover_mode=resume finds nothing to continue from, or wandb is wanted and not installed.
    """
    import_wandb(spec.wandb_mode)
    paths = spec.paths
    # A save in the making has a longer name than its step.
    has_save = bool(from_first(any(path.name.isdigit() for path in paths.recover.glob("*"))))
    if spec.recover_mode == "resume" and not has_save:
        raise ValueError(
            f"recover_mode: resume, but {paths.recover} holds no saved state; "
            "use recover_mode=auto to start when there is none"
        )
    continues = has_save and spec.recover_mode in ("auto", "resume")
    if has_save and not continues:
        logger.warning(
            "a saved state of this trial exists; recover_mode=auto would continue it. Starting anew instead."
        )
    if is_first():
        if not continues:
            set_aside([paths.recover, paths.checkpoints, paths.logs])
        for path in (paths.logs, paths.checkpoints, paths.recover):
            path.mkdir(parents=True, exist_ok=True)
        replace_text(paths.logs / "config.json", spec.config_json)
    from_first(0)  # the directories are there before another process looks
    return continues


@contextmanager
def write_log(directory: Path) -> Iterator[None]:
    """While entered, the log also goes to `run.log` in the directory; each process has its own."""
    name = LOG_FILE if is_first() else f"run.{jax.process_index()}.log"
    handler = logging.FileHandler(directory / name)
    handler.setFormatter(logging.Formatter(LOG_FORMAT, LOG_TIME_FORMAT))
    root = logging.getLogger("realjax")
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


def set_aside(directories: list[Path]) -> None:
    """Renames those that hold something to `<name>.<n>`, with the same n for all."""
    present = [d for d in directories if d.is_dir() and any(d.iterdir())]
    if not present:
        return
    n = next(n for n in range(1, 100_000) if not any(d.with_name(f"{d.name}.{n}").exists() for d in directories))
    for directory in present:
        directory.rename(directory.with_name(f"{directory.name}.{n}"))
        logger.info("kept the earlier run's %s as %s.%d", directory, directory.name, n)
