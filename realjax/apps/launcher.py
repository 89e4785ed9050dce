"""Starts a run elsewhere: `realjax launch slurm|ray|k8s|local [flags] <experiment> key=value ...`.

The experiment's options say how many machines and devices, where files go and how often to start again
(n_nodes, n_gpus_per_node, fileroot, partition, image_name, nodelist, recover_retries); flags say the rest. In place of
an experiment a recipe can be given, `--config=configs/sft.py --config.<option>=value`; behind an experiment
`--config FILE.yaml` is a file of options.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from realjax.allocation.modes import check_options
from realjax.apps.words import names_recipe, take_option_files
from realjax.launch import kubernetes, local, ray, slurm
from realjax.launch.kubernetes import KubernetesJob
from realjax.launch.ray import RayJob
from realjax.launch.restarts import find_word
from realjax.launch.slurm import SlurmJob, split_environment
from realjax.options.checks import resolve_names, validate
from realjax.options.common import CommonExperimentConfig
from realjax.options.config_dict import EXPERIMENT_KEY, from_config_dict
from realjax.options.machine import devices_per_node, resolve_machine
from realjax.options.parallel import allocation_options
from realjax.options.parsing import parse_overrides
from realjax.options.paths import check_writable, run_paths

READ_BY_LOCAL = ("n_gpus_per_node", "recover_mode", "recover_retries")
USAGE = "realjax launch {name} [flags] <experiment> key=value ..."


@dataclass(frozen=True, kw_only=True)
class RunCommand:
    """A run: its options, names filled in, and the command that every one of its processes is started with."""

    config: CommonExperimentConfig
    module: str
    words: tuple[str, ...]

    @property
    def num_restarts(self) -> int:
        """How often it is started again at most: only where it then goes on from its saves."""
        return self.config.recover_retries if self.config.recover_mode == "auto" else 0

    @property
    def name(self) -> str:
        """Of the experiment and the trial."""
        return f"{self.config.experiment_name}_{self.config.trial_name}"

    def command(self, python: str = sys.executable) -> tuple[str, ...]:
        """Returns the words of the command."""
        return (python, "-m", self.module, *self.words)


def main(words: Sequence[str]) -> int:
    """Runs the command line and returns the exit code. ValueError for whatever the user can mend."""
    name = words[0] if words else ""
    if name not in LAUNCHERS:
        print(f"{__doc__}\nLaunchers: {', '.join(LAUNCHERS)}; realjax launch <launcher> --help lists its flags.")
        if name in ("--help", "-h", "help"):
            return 0
        raise ValueError(f"launch: found {name!r}; it needs one of {', '.join(LAUNCHERS)}")
    return LAUNCHERS[name](words[1:])


def read_run(words: Sequence[str], elsewhere: str | None = None) -> RunCommand:
    """Returns the run of an experiment's words or a recipe's flags, checked as the run itself will be.

    A run that is started again has to find its saves: recover_mode is auto unless it is given. With `elsewhere`, a
    directory for fileroot where none is given, the files are those of another machine, and are not looked for.
    """
    from realjax.apps import quickstart, recipe

    words = tuple(words[1:] if words[:1] == ["--"] else words)
    if not words:
        raise ValueError("launch: no experiment was given; name one, with its options")
    is_recipe, of_file = names_recipe(words), dict[str, object]()
    if is_recipe:
        found = recipe.read_config(["launch", *words])
        experiment = str(found[EXPERIMENT_KEY])
        config = from_config_dict(quickstart.find_experiment(experiment).config_cls, found)
    else:
        experiment, config_cls = words[0], quickstart.find_experiment(words[0]).config_cls
        overrides, layers = take_option_files(words[1:], config_cls, experiment)
        config = parse_overrides(config_cls, overrides, *layers)
        of_file = join_layers(layers)
    spell: Callable[[str], str] = (lambda name: f"--config.{name}") if is_recipe else str
    if find_word(words, spell("recover_mode")) is None and "recover_mode" not in of_file:
        config = dataclasses.replace(config, recover_mode="auto")
    if config.fileroot is None:
        config = dataclasses.replace(config, fileroot=elsewhere)
    config = resolve_names(config, experiment)
    if elsewhere is None:
        validate(config)
    # What the machines elsewhere have is not known here.
    config = resolve_machine(config, local.DEFAULT_GPUS_PER_NODE, {})
    check_options(allocation_options(config))
    named = {name: getattr(config, name) for name in ("experiment_name", "trial_name", "fileroot", "recover_mode")}
    return RunCommand(
        config=config,
        module=recipe.__name__ if is_recipe else quickstart.__name__,
        words=(*words, *(f"{spell(name)}={value}" for name, value in named.items())),
    )


def _parser(name: str, doc: str) -> argparse.ArgumentParser:
    # A flag of the run's, such as --config, is none of ours.
    parser = argparse.ArgumentParser(
        prog=f"realjax launch {name}", usage=USAGE.format(name=name), description=doc, allow_abbrev=False
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted, and do nothing")
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME=value", help="of every process; may be repeated"
    )
    return parser


def _add_task_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-gpus", action="store_true", help="ask for no GPUs: nodes without any")
    parser.add_argument(
        "--tasks", choices=("gpu", "node"), help="a process for each GPU (the default), or each node (without GPUs)"
    )


def count_tasks(run: RunCommand, args: argparse.Namespace) -> int:
    """Returns the processes of a node, by the flags of `_add_task_flags`."""
    is_one = args.tasks == "node" or (args.no_gpus and args.tasks is None)
    return 1 if is_one else devices_per_node(run.config)


def _split(parser: argparse.ArgumentParser, words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the launcher's flags, which come first, and the run's words."""
    parser.add_argument("run", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    at = next((i for i, word in enumerate(words) if word.startswith("--config")), len(words))
    args = parser.parse_args(list(words[:at]))
    return args, [*args.run, *words[at:]]


def launch_slurm(words: Sequence[str]) -> int:
    """Submits a run as a Slurm job, or prints its script."""
    parser = _parser("slurm", slurm.__doc__ or "")
    for name, text in {
        "--account": "whom the job is charged to",
        "--time": "the longest that one start of the job takes, such as 4:00:00",
        "--mounts": "of the container of image_name, as from:to,...",
    }.items():
        parser.add_argument(name, help=text)
    parser.add_argument("--exclusive", action="store_true", help="share the nodes with no other job")
    _add_task_flags(parser)
    parser.add_argument("--python", default=sys.executable, help="of the processes, in a container perhaps another")
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="another option of sbatch")
    parser.add_argument("--follow", action="store_true", help="show the job's log until it is over; Ctrl-C leaves it")
    args, rest = _split(parser, words)
    run = read_run(rest)
    job = make_slurm_job(run, args)
    if args.dry_run:
        print(job.render(), end="")
        return 0
    check_writable(run_paths(run.config))
    job_id = slurm.submit(job)
    print(f"job {job_id} was submitted; its script and logs are in {job.folder}")
    return slurm.follow(job_id, job.folder, sys.stdout) if args.follow else 0


def make_slurm_job(run: RunCommand, args: argparse.Namespace) -> SlurmJob:
    """Returns the job of a run with the command's flags."""
    config, logs = run.config, run_paths(run.config).logs
    return SlurmJob(
        name=run.name,
        command=run.command(args.python),
        folder=logs.with_name(f"{logs.name}.slurm"),  # beside: a run that starts anew sets its log directory aside
        n_nodes=config.n_nodes,
        tasks_per_node=count_tasks(run, args),
        gpus_per_node=0 if args.no_gpus else devices_per_node(config),
        account=args.account,
        partition=config.partition,
        time=args.time,
        nodelist=config.nodelist,
        exclusive=args.exclusive,
        image=config.image_name,
        mounts=args.mounts,
        num_restarts=run.num_restarts,
        environment=split_environment(args.env),
        options=tuple(args.sbatch),
    )


def launch_kubernetes(words: Sequence[str]) -> int:
    """Prints the manifests of a run as a Kubernetes job."""
    parser = _parser("k8s", kubernetes.__doc__ or "")
    parser.add_argument("--claim", required=True, help="persistent volume claim with models, data and fileroot")
    parser.add_argument("--mount", default="/data", help="where each pod has it")
    parser.add_argument("--namespace", help="of the job and its service")
    parser.add_argument("--no-gpus", action="store_true", help="pods without GPUs")
    parser.add_argument("--python", default="python3", help="of the processes, in the image")
    args, rest = _split(parser, words)
    run = read_run(rest, elsewhere=f"{args.mount}/realjax")
    config = run.config
    if not args.dry_run:
        raise ValueError("launch k8s: it submits nothing itself; give --dry-run, and the output to kubectl apply -f -")
    if config.image_name is None:
        raise ValueError("image_name: found null, but a pod needs an image; name one that has realjax and its Python")
    job = KubernetesJob(
        name=run.name,
        command=run.command(args.python),
        image=config.image_name,
        n_nodes=config.n_nodes,
        gpus_per_node=0 if args.no_gpus else devices_per_node(config),
        claim=args.claim,
        mount=args.mount,
        namespace=args.namespace,
        num_restarts=run.num_restarts,
        environment=split_environment(args.env),
    )
    print(job.render(), end="")
    return 0


def launch_ray(words: Sequence[str]) -> int:
    """Runs on a Ray cluster, whose output is shown here, and returns the run's exit code."""
    parser = _parser("ray", ray.__doc__ or "")
    parser.add_argument("--address", default="auto", help="of the cluster; auto: RAY_ADDRESS, or one on this machine")
    _add_task_flags(parser)
    parser.add_argument("--cpus", type=int, default=1, help="CPUs that a process asks Ray for")
    args, rest = _split(parser, words)
    run = read_run(rest)
    config, per_node = run.config, count_tasks(run, args)
    job = RayJob(
        command=run.command(),
        num_processes=config.n_nodes * per_node,
        processes_per_node=per_node,
        gpus_per_process=0 if args.no_gpus else devices_per_node(config) // per_node,
        cpus_per_process=args.cpus,
        num_restarts=run.num_restarts,
        environment=split_environment(args.env),
    )
    if args.dry_run:
        print(job)
        return 0
    return job.run(args.address)


def join_layers(layers: Iterable[Mapping[str, object]]) -> dict[str, object]:
    """Returns the options of a recipe and of a file as one mapping, the later one's values."""
    return {name: value for layer in layers for name, value in layer.items()}


def launch_local(words: Sequence[str]) -> int:
    """Starts a run in several processes of this machine."""
    from realjax.apps import quickstart

    of_file: Mapping[str, object] = {}
    experiment = next((word for word in words if word in quickstart.EXPERIMENTS), None)
    if experiment is not None:
        _, layers = take_option_files(words, quickstart.find_experiment(experiment).config_cls, experiment)
        of_file = join_layers(layers)
    # The launcher itself reads nothing but words.
    named = {name: of_file.get(name) for name in READ_BY_LOCAL if find_word(words, name) is None}
    return local.main([*words, *(f"{name}={value}" for name, value in named.items() if value is not None)])


LAUNCHERS: dict[str, Callable[[Sequence[str]], int]] = {
    "local": launch_local,
    "slurm": launch_slurm,
    "ray": launch_ray,
    "k8s": launch_kubernetes,
}
