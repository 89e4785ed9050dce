"""Where a run starts: at the newest whole save of a run that is the same one, or anew; and its directories then."""

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace

from realjax.core.identity import Identity
from realjax.core.json_text import JsonObject
from realjax.core.processes import from_first, is_first
from realjax.core.progress import Progress
from realjax.core.trees import Tree
from realjax.dataflow.run import RunSpec
from realjax.engine.state import TrainState
from realjax.record import report
from realjax.record.metrics import replace_text
from realjax.record.rundir import set_aside
from realjax.runtime.checkpoint import RunState, clear_after, drop_oldest, find_save, restore, saved_steps
from realjax.runtime.roles import Role, load_role

logger = logging.getLogger("realjax.resume")
EPOCHS = "exp_ctrl.total_train_epochs"
LONGEST_VALUE = 40  # characters of a value shown in a message


def find_start(spec: RunSpec) -> RunState | None:
    """Returns the save to continue from, its roles still on the disk, or None for a run that starts anew.

    Changes nothing. Raises ValueError when recover_mode=resume finds none, none of the saves is whole, or they are of
    another run.
    """
    directory = spec.paths.recover
    if spec.recover_mode not in ("auto", "resume"):
        if saved_steps(directory):
            logger.warning(
                "a saved state of this trial exists; recover_mode=auto would continue it. Starting anew instead."
            )
        return None
    save = find_save(directory)
    if save is None and spec.recover_mode == "resume":
        raise ValueError(
            f"recover_mode: resume, but {directory} holds no saved state; use recover_mode=auto to start when there is "
            "none"
        )
    if save is not None:
        steering = compare(save.counters["identity"], spec.identity, f"the save in {directory}")
        _refuse_nothing_to_do(spec, save, steering)
        if spec.schedule_epochs is None and any(change.startswith(f"{EPOCHS} ") for change in steering):
            logger.warning(
                "the learning rate follows the schedule of %d epochs from here on; lr_schedule_epochs=%s keeps to that "
                "of before, at its floor (min_lr_ratio) where it has ended",
                *(spec.num_epochs, save.counters["identity"]["steering"][EPOCHS]),
            )
    return save


def open_run_directory(spec: RunSpec, *, continues_after: int | None) -> None:
    """Prepares the run's directories: those of a run that continues after a step, or empty ones.

    A run that starts anew sets what an earlier run of the same names left aside, under `<trial>.<n>`.
    """
    paths = spec.paths
    if is_first():
        if continues_after is None:
            set_aside([paths.recover, paths.checkpoints, paths.logs])
        for path in (paths.logs, paths.checkpoints, paths.recover):
            path.mkdir(parents=True, exist_ok=True)
        if continues_after is not None:
            clear_after(paths.recover, continues_after)
            drop_oldest(paths.recover, spec.max_recover_saves, spec.keep_every)
            # It says that a run is finished.
            (paths.logs / report.PARTS_FILE).unlink(missing_ok=True)
        replace_text(paths.logs / "config.json", spec.config_json)
    from_first(0)  # the directories are there before another process looks


def is_finished(spec: RunSpec, save: RunState) -> bool:
    """Returns whether the run that the save is of took all steps and wrote its report."""
    return save.step == spec.loader.total_steps and report.is_finished(spec.paths.logs)


def first_state(
    spec: RunSpec, roles: Mapping[str, Role], save: RunState | None, progress: Progress | None = None
) -> RunState:
    """Returns the state after the save's step, else the one at step 0, with every role on its devices."""
    progress = progress or Progress()

    def load(name: str) -> TrainState | Tree:
        progress.begin(f"loading {name}")
        return load_role(roles[name], spec.seed)

    if save is None:
        return RunState(step=0, roles={name: load(name) for name in roles})
    progress.begin("restoring the save")
    changing = {name: role for name, role in roles.items() if role.optimizer is not None or role.spec.is_averaged}
    abstract = {name: role.abstract_state() for name, role in changing.items()}
    state = restore(spec.paths.recover, save, abstract, empty_layers(roles, changing))
    fixed = {name: load(name) for name in roles if name not in changing}
    return replace(state, roles={**fixed, **state.roles})


def empty_layers(roles: Mapping[str, Role], names: Iterable[str]) -> dict[str, int]:
    """Returns how many empty layers each role has."""
    return {name: roles[name].model.config.num_empty_layers for name in names}


def compare(saved: JsonObject, identity: Identity, subject: str) -> list[str]:
    """Returns the changes that take effect from here on, each `name before -> now`; the log lists all that are allowed.

    Raises ValueError for one that would make it another run. What only one side knows of is not compared.
    """
    now = json.loads(json.dumps(asdict(identity)))
    differing = {
        kind: [name for name in now[kind] if name in saved[kind] and saved[kind][name] != now[kind][name]]
        for kind in now
    }
    show = lambda kind, name, form: form.format(name, *(_short(side[kind][name]) for side in (saved, now)))
    if differing["fixed"] or differing["contents"]:
        names = [show("fixed", name, "{} ({} there, {} here)") for name in differing["fixed"]] + differing["contents"]
        raise ValueError(
            f"recover: {subject} was made with another {', another '.join(names)}; continue with the same, start anew "
            "with recover_mode=disabled, or use another trial_name"
        )
    changes = {kind: [show(kind, name, "{} {} -> {}") for name in names] for kind, names in differing.items()}
    if changes["harmless"]:
        logger.info("changed since the start, with no effect on the result: %s", ", ".join(changes["harmless"]))
    if changes["steering"]:
        logger.warning("changed since the start, with effect from here on: %s", ", ".join(changes["steering"]))
    return changes["steering"]


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."


def _refuse_nothing_to_do(spec: RunSpec, save: RunState, steering: list[str]) -> None:
    """Raises ValueError when the save leaves no step on which the changes could act."""
    total = spec.loader.total_steps
    if save.step > total or (save.step == total and steering):
        raise ValueError(
            f"recover: the save in {spec.paths.recover} is after step {save.step}, and this run has {total} steps, so "
            f"{', '.join(steering)} would have no effect; raise total_train_epochs, or use another trial_name"
        )
