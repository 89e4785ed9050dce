"""Options that every experiment has: names, machine, seeds, and when to stop, save and evaluate."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from realjax.core.option import check_ranges, nested, option
from realjax.core.planner_config import PlannerConfig


@dataclass(frozen=True, kw_only=True)
class ExperimentSaveEvalControl:
    """How long to train, and when to save and evaluate. Any satisfied trigger fires; null turns a trigger off."""

    total_train_epochs: int = option(1, "passes over the training data", at_least=1, at_most=100_000)
    lr_schedule_epochs: int | None = option(
        None,
        "epochs over which learning rates decay, and stay at their floor (min_lr_ratio) from then on; null is "
        "total_train_epochs, also of a run that continues with more of them",
        at_least=1,
        at_most=100_000,
    )
    max_steps: int | None = option(
        None,
        "end the run, its schedules and its training data after so many steps; null is that of the epochs",
        at_least=1,
    )
    save_freq_epochs: int | None = option(None, "save every so many epochs", at_least=1)
    save_freq_steps: int | None = option(None, "save every so many steps", at_least=1)
    save_freq_secs: int | None = option(None, "save at the first step end after so many seconds", at_least=1)
    eval_freq_epochs: int | None = option(None, "evaluate at the end of every so many epochs", at_least=1)
    eval_freq_steps: int | None = option(None, "evaluate every so many steps", at_least=1)
    eval_freq_secs: int | None = option(None, "evaluate at the first step end after so many seconds", at_least=1)
    benchmark_steps: int | None = option(
        None,
        "stop after so many steps and print the mean step time; no checkpoint or training state is written",
        at_least=1,
    )

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def evaluates(self) -> bool:
        """True when any evaluation trigger is set."""
        return any((self.eval_freq_epochs, self.eval_freq_steps, self.eval_freq_secs))


@dataclass(frozen=True, kw_only=True)
class CommonExperimentConfig:
    """Options shared by all experiments."""

    experiment_name: str | None = option(None, "name of the experiment; null gives quickstart-<experiment>")
    trial_name: str | None = option(None, "name of this run of it; null gives run<date and time>")
    fileroot: str | None = option(
        None, "directory of logs and checkpoints; null takes REALJAX_FILEROOT, else ~/.cache/realjax"
    )
    mode: Literal["slurm", "local", "ray"] | None = option(
        None,
        "where processes run; slurm and ray mean this process when this machine has no such cluster, null that of the "
        "job that this process is in, if any",
    )
    partition: str | None = option(None, "Slurm's partition for a job that a launcher submits; null is the cluster's")
    image_name: str | None = option(
        None, "container image that a launcher's processes run in: by pyxis under Slurm, of the pods under Kubernetes"
    )
    allocation_mode: str | None = option(
        None,
        "how calls are laid out: manual (each call's own sizes), pipe_model, pipe_data, sizes such as d2p1m4 "
        "(data, pipeline, model), heuristic, search; null is data parallelism over all devices",
    )
    allocation_use_cache: bool = option(
        False, "search: take the plan that an earlier search found, if nothing that it goes by has changed"
    )
    planner: PlannerConfig = nested(PlannerConfig)
    n_nodes: int = option(1, "machines", at_least=1, at_most=65_536)
    n_gpus_per_node: int | None = option(
        None,
        "accelerators of one machine; without any, as many virtual CPU devices; null is what the sizes of calls ask "
        "for, or all that there are (one CPU device)",
        at_least=1,
        at_most=4096,
    )
    nodelist: str | None = option(
        None, "names of the run's machines, such as NODE[01-04], for device_mesh; null is NODE01, NODE02, ..."
    )
    seed: int = option(
        1, "seed of everything random: data order, initial weights, sampling", at_least=0, at_most=2**32 - 1
    )
    accelerator_settings: Literal["recommended", "none"] = option(
        "recommended",
        "what XLA, CUDA and NCCL are told before they start, by the kind of accelerator; what the environment has "
        "already stays, and none leaves it at that",
    )
    deterministic: bool = option(
        False, "on GPUs, every run of a program gives the same bits, more slowly; on CPUs it does anyway"
    )
    max_nonfinite_steps: int = option(5, "stop after so many updates in a row with nan or inf gradients", at_least=1)
    watchdog_secs: int | None = option(
        300,
        "the run ends, with the stacks of all processes, when one makes no progress for ten times as long as the same "
        "has taken before, and at least for so long; six times that where it was never done, twelve for loading; "
        "null: never",
        at_least=1,
        at_most=1_000_000,
    )
    watchdog_compile_secs: int | None = option(
        None,
        "the same for a program that compiles, which may say nothing for long; null: twelve times watchdog_secs",
        at_least=1,
        at_most=1_000_000,
    )
    wandb_mode: Literal["disabled", "online", "offline"] = option(
        "disabled", "log to Weights & Biases too; needs the extra realjax[wandb]"
    )
    wandb_project: str = option("realjax", "the project there; the experiment's name groups runs in it")
    recover_mode: Literal["disabled", "auto", "save", "resume"] = option(
        "disabled",
        "the training state is saved at save_freq_*, at the end and on SIGTERM; disabled and save start anew (and "
        "keep an "
        "earlier run's files aside), auto continues from the last complete save if there is one, resume must find one",
    )
    recover_retries: int = option(
        1,
        "with recover_mode=auto, how often a launcher starts a run again that failed, was preempted or lost a machine",
        at_least=0,
        at_most=1_000_000,
    )
    max_recover_saves_to_keep: int = option(2, "training states kept; older ones are deleted", at_least=1)
    keep_every: int | None = option(
        None, "training states after every so many steps are kept besides; null keeps the newest ones alone", at_least=1
    )
    exp_ctrl: ExperimentSaveEvalControl = nested(ExperimentSaveEvalControl)

    # The older release has these at the top level.
    ALIASES: ClassVar[dict[str, str]] = {
        name: f"exp_ctrl.{name}"
        for name in (
            "total_train_epochs",
            "lr_schedule_epochs",
            "max_steps",
            "save_freq_epochs",
            "save_freq_steps",
            "save_freq_secs",
            "eval_freq_epochs",
            "eval_freq_steps",
            "eval_freq_secs",
            "benchmark_steps",
        )
    }
    NO_EFFECT: ClassVar[dict[str, str]] = {
        "debug": "checks are always on",
        "cache_clear_freq": "XLA manages device memory, there is no cache to clear",
        "ignore_worker_error": "there are no worker processes",
    }
    # What an experiment class can do; the checks read it.
    EVALUATES: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def held_out_use(self) -> str | None:
        """How the use of held-out data is turned off, None where there is none."""
        return "eval_freq_*=null" if self.exp_ctrl.evaluates else None

    @property
    def places_by_size(self) -> bool:
        """True when the sizes that models are declared with decide where calls run."""
        return self.allocation_mode == "heuristic"

    @property
    def is_planned(self) -> bool:
        """True when a search decides where calls run."""
        return self.allocation_mode == "search"

    @property
    def unused(self) -> frozenset[str]:
        """Names of the models and calls that a run with these options does without."""
        return frozenset()

    def check(self) -> None:
        """Raises ValueError for an option that others leave without what it needs."""

    def notices(self) -> list[str]:
        """Returns a line for the log for every option whose effect here is not what its name says."""
        return []
