"""The command line: `python3 -m realjax.apps.quickstart <experiment> key=value ...`, also installed as `realjax`.

Beside the experiments it knows a few other commands: `COMMANDS`.
"""

if __name__ == "__main__":
    from realjax.apps.start import begin

    begin()

import dataclasses
import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax

from realjax.allocation import modes
from realjax.allocation.modes import check_options
from realjax.allocation.plan import AllocationPlan
from realjax.apps.devices import join_group, prepare_devices, prepare_environment
from realjax.apps.errors import end_process, report_errors
from realjax.apps.log import configure_logging
from realjax.apps.named_recipes import asks_for_list, list_recipes
from realjax.apps.present import count_devices, count_present
from realjax.apps.words import (
    HELP_FLAGS,
    PRINT_FLAG,
    VERSION_FLAGS,
    describe,
    help_topic,
    print_config,
    say,
    say_version,
    take_option_files,
)
from realjax.core.processes import text_from_first
from realjax.dataflow.run import RunPaths, RunSpec
from realjax.launch import ray, slurm
from realjax.launch.environment import ProcessGroup, end_with_launcher, find_process_group
from realjax.options.checks import list_notices, resolve_names, validate
from realjax.options.common import CommonExperimentConfig
from realjax.options.distill import DistillConfig
from realjax.options.generation import GenConfig
from realjax.options.machine import JOB_VARIABLES, resolve_machine
from realjax.options.parallel import allocation_options
from realjax.options.parsing import nearest_names, parse_overrides
from realjax.options.paths import check_writable, run_paths
from realjax.options.rl import GRPOConfig, PPOConfig, ReinforcePPConfig, ReMaxConfig, RLOOConfig
from realjax.options.supervised import DPOConfig, KTOConfig, ORPOConfig, RWConfig, SFTConfig, SimPOConfig
from realjax.runtime.watchdog import end_if_stuck, watch_run

logger = logging.getLogger("realjax.quickstart")
PLAN_FLAG = "--plan"
IS_USABLE: dict[str, Callable[[], bool]] = {"slurm": slurm.is_usable, "ray": ray.is_installed}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """An experiment's options, and the module whose `build(config)` describes its run."""

    config_cls: type[CommonExperimentConfig]
    module: str
    summary: str

    def build(self, config: CommonExperimentConfig) -> RunSpec:
        """Returns the run, which was checked as every experiment's is. Raises ValueError for what cannot work."""
        from realjax.experiments.checks import check_run

        spec: RunSpec = importlib.import_module(self.module).build(config)
        check_run(spec)
        return spec


EXPERIMENTS = {
    "sft": Experiment(
        config_cls=SFTConfig, module="realjax.experiments.sft", summary="supervised fine-tuning on prompts and answers"
    ),
    "rw": Experiment(
        config_cls=RWConfig, module="realjax.experiments.rw", summary="a reward model from pairs of answers"
    ),
    "dpo": Experiment(
        config_cls=DPOConfig, module="realjax.experiments.dpo", summary="direct preference optimisation on pairs"
    ),
    "kto": Experiment(
        config_cls=KTOConfig, module="realjax.experiments.kto", summary="KTO on answers that are desirable or not"
    ),
    "simpo": Experiment(
        config_cls=SimPOConfig, module="realjax.experiments.simpo", summary="SimPO on pairs, without a reference"
    ),
    "orpo": Experiment(
        config_cls=ORPOConfig, module="realjax.experiments.orpo", summary="ORPO on pairs, without a reference"
    ),
    "ppo": Experiment(
        config_cls=PPOConfig, module="realjax.experiments.ppo", summary="PPO on rewards of a model's own answers"
    ),
    "grpo": Experiment(
        config_cls=GRPOConfig, module="realjax.experiments.grpo", summary="GRPO: answers judged within a prompt's group"
    ),
    "rloo": Experiment(
        config_cls=RLOOConfig, module="realjax.experiments.rloo", summary="RLOO: leave-one-out baselines"
    ),
    "remax": Experiment(
        config_cls=ReMaxConfig, module="realjax.experiments.remax", summary="ReMax: the greedy answer as baseline"
    ),
    "reinforce_pp": Experiment(
        config_cls=ReinforcePPConfig,
        module="realjax.experiments.reinforce_pp",
        summary="REINFORCE++: returns normalised over the whole batch",
    ),
    "distill": Experiment(
        config_cls=DistillConfig,
        module="realjax.experiments.distill",
        summary="distillation: a teacher's distributions at the tokens of own answers",
    ),
    "gen": Experiment(config_cls=GenConfig, module="realjax.experiments.gen", summary="answers to a file of prompts"),
}


@dataclass(frozen=True, kw_only=True)
class Command:
    """What is started beside the experiments: `main(words)` of its module returns the exit code."""

    module: str
    summary: str

    def run(self, words: list[str]) -> int:
        """Carries it out. ValueError for whatever the user can mend."""
        return importlib.import_module(self.module).main(words)


COMMANDS = {
    "plan": Command(module="realjax.apps.plan", summary="predicts where calls would run best, on any cluster"),
    "data check": Command(module="realjax.apps.data_check", summary="shows rows of a file as the model will see them"),
    "data example": Command(module="realjax.apps.data_example", summary="writes small files of data to begin with"),
    "profile": Command(module="realjax.apps.profile", summary="measures this machine for the planner"),
    "doctor": Command(module="realjax.apps.doctor", summary="looks for what would keep a run from working"),
    "launch": Command(module="realjax.apps.launcher", summary="starts a run elsewhere, such as in a Slurm job"),
    "chat": Command(module="realjax.apps.chat", summary="talks to a checkpoint in the terminal"),
    "report": Command(module="realjax.apps.report", summary="makes the report of a run again"),
    "compare": Command(module="realjax.apps.compare", summary="shows runs side by side"),
    "sample": Command(module="realjax.apps.sample", summary="shows answers of checkpoints side by side"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    with report_errors() as end:
        if (other := next((name for name in COMMANDS if args[: len(name.split())] == name.split()), None)) is not None:
            end.code = COMMANDS[other].run(args[len(other.split()) :])
        elif (command := read_command(args)) is not None:
            end.code = run_experiment(*command, args)
        elif not args:
            end.code = 2
    return end.code


def read_command(args: list[str]) -> tuple[str, CommonExperimentConfig] | None:
    """Returns the experiment's name and its options; None where help was asked for, which is printed then.

    Raises ValueError for an unknown experiment or option, or a wrong value.
    """
    if not args or args[0] in HELP_FLAGS:
        say(_usage())
        return None
    if args[0] in VERSION_FLAGS:
        say_version()
        return None
    name, *words = args
    experiment = find_experiment(name)
    if (topic := help_topic(words)) is not None:
        say(describe(experiment.config_cls, name, topic))
        return None
    if asks_for_list(words):
        say(list_recipes(name))
        return None
    configure_logging()
    words, layers = take_option_files(words, experiment.config_cls, name)
    config = parse_overrides(experiment.config_cls, [w for w in words if w not in (PLAN_FLAG, PRINT_FLAG)], *layers)
    if PRINT_FLAG in words:
        print_config(config)
        return None
    return name, config


def find_experiment(name: str) -> Experiment:
    """Returns the experiment called `name`; ValueError with the nearest name if there is none."""
    if name not in EXPERIMENTS:
        near = nearest_names(name, [*EXPERIMENTS, *COMMANDS], count=1)
        hint = f"did you mean {near[0]}?" if near else "the first word names one, see realjax --help"
        raise ValueError(f"unknown experiment '{name}': the experiments are {', '.join(EXPERIMENTS)}; {hint}")
    return EXPERIMENTS[name]


def run_experiment(name: str, config: CommonExperimentConfig, words: Sequence[str] = ()) -> int:
    """Checks `config`, prepares the devices and runs the experiment, or prints its plan; returns the exit code.

    `words` are the command's, which the launcher that `mode` names is to start elsewhere. ValueError, before any device
    work, for whatever the user can mend.
    """
    plan_only = PLAN_FLAG in words
    if not plan_only and (launcher := find_launcher(config.mode)) is not None:
        return COMMANDS["launch"].run([launcher, *words])
    experiment = find_experiment(name)
    console = configure_logging()
    config = resolve_names(config, name)
    validate(config)
    group = find_process_group(os.environ)
    config = resolve_machine(config, count_present(group), os.environ)
    check_options(allocation_options(config))
    end_with_launcher()
    notices = prepare_environment(config, group)
    if group is not None:
        end_if_stuck(config.watchdog_secs)
        config = join_processes(config, group)
    for notice in notices:  # only now is it known who logs
        logger.info(notice)
    paths = run_paths(config)
    if not plan_only:
        announce(name, config, paths)
    devices = prepare_devices(config.n_nodes, count_devices(config) // config.n_nodes, paths.compilation_cache)
    # Imported here: help and bad options should not wait for everything that a run needs.
    from realjax.apps.checkup import warn_before_run
    from realjax.runtime import loop

    if plan_only:
        print(describe_run(experiment, config, devices)[1].describe())
        return 0
    with watch_run(paths.logs, config.watchdog_secs, config.watchdog_compile_secs) as progress:
        progress.begin("the data and the plan", is_busy=True)
        spec, plan = describe_run(experiment, config, devices)
        progress.begin("the checks of the machine")
        warn_before_run(spec)
        return loop.run(spec, plan, console, progress)


def describe_run(
    experiment: Experiment, config: CommonExperimentConfig, devices: tuple[jax.Device, ...]
) -> tuple[RunSpec, AllocationPlan]:
    """Returns the run, with its data read, and where its calls run. ValueError for what cannot work."""
    from realjax.allocation.allocate import allocate
    from realjax.allocation.settle import settle_open

    spec = settle_open(experiment.build(config), devices)
    return spec, allocate(spec, devices)


def announce(name: str, config: CommonExperimentConfig, paths: RunPaths) -> None:
    """Says where the run writes, and which options do not what they say. ValueError where nothing can be written."""
    check_writable(paths)
    logger.info("Running %s experiment.", name)
    logger.info("Logs will be dumped to %s", paths.logs)
    if name != "gen":
        logger.info("Model checkpoints will be saved to %s", paths.checkpoints)
    for notice in (*list_notices(config), *modes.list_notices(allocation_options(config))):
        logger.info(notice)


def join_processes(config: CommonExperimentConfig, group: ProcessGroup) -> CommonExperimentConfig:
    """Joins the run's processes and returns `config` with the first one's trial name. ValueError as `join_group`."""
    join_group(config, group)
    return dataclasses.replace(config, trial_name=text_from_first(str(config.trial_name)))


def find_launcher(mode: str | None) -> str | None:
    """Returns the launcher that `mode` asks for, None where a run stays in this process.

    It does in a job of the launcher's, and, with a warning, where there is no such cluster.
    """
    if mode in (None, "local") or find_process_group(os.environ) is not None or JOB_VARIABLES[mode] in os.environ:
        return None
    if IS_USABLE[mode]():
        return mode
    logger.warning("mode=%s: no such cluster here, so the run stays in this process, as with mode=local.", mode)
    return None


def _usage() -> str:
    lines = [f"  {name:12} {experiment.summary}" for name, experiment in EXPERIMENTS.items()]
    lines += ["", "Other commands:", *(f"  {name:12} {command.summary}" for name, command in COMMANDS.items())]
    return "\n".join(
        [
            "Usage: realjax <experiment> key=value ...",
            "",
            "Experiments:",
            *lines,
            "",
            "realjax <experiment> --help shows the options that matter, --help all every one, --help WORD those with a",
            "word. --recipe lists recipes, --recipe NAME takes the options of one, --config FILE.yaml those of a file.",
            "--plan prints where calls would run, and stops. --version says what is installed.",
            "REALJAX_TRACEBACK=1 shows the traceback of an error.",
        ]
    )


if __name__ == "__main__":
    end_process(main())
