"""`realjax profile key=value ...`: measures the machine at hand and writes a cluster.json for the planner."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from realjax.allocation.cluster import Cluster
from realjax.apps.devices import join_group, prepare_devices, prepare_environment
from realjax.apps.log import configure_logging
from realjax.apps.words import HELP_FLAGS
from realjax.core.processes import is_first
from realjax.data.jsonl import load_rows
from realjax.hf.files import resolve_model_path
from realjax.hf.load import load_config
from realjax.launch.accelerators import find_accelerator
from realjax.launch.environment import end_with_launcher, find_process_group
from realjax.models.config import ModelConfig
from realjax.options.describe import describe_options
from realjax.options.parsing import parse_overrides
from realjax.options.paths import find_fileroot
from realjax.options.profile import ProfileConfig
from realjax.profiling.clock import Clock
from realjax.profiling.layers import PROGRAMS
from realjax.profiling.profile import Profile, Settings, TellFn
from realjax.record.metrics import replace_text

logger = logging.getLogger("realjax.profile")
USES = {"generate": ("decode",), "inference": ("forward",), "train_step": ("forward", "train", "remat", "nll")}
QUICK = {"batch_sizes": (2,), "seq_lens": (64,)}
QUICK_PROGRAMS = {"forward", "train", "decode"}


def main(words: list[str]) -> int:
    """Runs the command line and returns its exit code. ValueError, before any device work, for what cannot work."""
    if any(word in HELP_FLAGS for word in words):
        print(describe_options(ProfileConfig, "profile"), end="")
        return 0
    console = configure_logging()
    config = parse_overrides(ProfileConfig, words)
    output = Path(config.output).expanduser()
    _check_writable(output)
    models = load_models(config)
    tensor_sizes = find_tensor_sizes(config)
    end_with_launcher()
    group = find_process_group(os.environ)
    notices = prepare_environment(config, group)
    if group is not None:
        join_group(config, group)
    for notice in notices:
        logger.info(notice)
    cache = find_fileroot(config.fileroot) / ".cache" / "jax"
    devices = prepare_devices(config.n_nodes, config.n_gpus_per_node, cache)
    profile = Profile(make_settings(config, models, tensor_sizes, devices[0]), devices)
    with show_progress(console) as tell_fn, quiet_engine():
        cluster = profile.run(tell_fn)
    if is_first():
        replace_text(output, cluster.to_json())
        logger.info("%s", describe(cluster))
        logger.info("written to %s: plan with planner.cluster=%s", output, output)
    return 0


@contextmanager
def quiet_engine() -> Iterator[None]:
    """While entered, programs do not say what attention they have and how long they compiled: it is no news here."""
    engine = logging.getLogger("realjax.engine")
    level = engine.level
    engine.setLevel(logging.WARNING)
    try:
        yield
    finally:
        engine.setLevel(level)


def load_models(config: ProfileConfig) -> dict[str, ModelConfig]:
    """Returns the models to measure by their paths. Raises ValueError for one that is not there."""
    rows = load_rows(config.models_jsonl, {"path": str}, "models_jsonl") if config.models_jsonl else []
    paths = [*config.models, *(str(row["path"]) for row in rows)]
    return {path: load_config(resolve_model_path(path, need_weights=False)) for path in paths}


def find_tensor_sizes(config: ProfileConfig) -> tuple[int, ...]:
    """Returns the sizes of tensor parallelism to measure. Raises ValueError for one larger than the cluster."""
    num_devices = config.n_nodes * config.n_gpus_per_node
    if config.allocations_jsonl:
        rows = load_rows(config.allocations_jsonl, {"model_parallel_size": int}, "allocations_jsonl")
        sizes = {int(row["model_parallel_size"]) for row in rows}
    elif config.model_parallel_sizes is not None:
        sizes = set(config.model_parallel_sizes)
    else:
        # Of a CPU's virtual devices more than two tell nothing new, and compile for minutes.
        most = 1 if config.quick else 2 if find_accelerator(os.environ) is None else 8
        sizes = {n for n in (1, 2, 4, 8) if n <= most and config.n_gpus_per_node % n == 0}
    if wrong := [n for n in sorted(sizes) if n < 1 or n > num_devices]:
        raise ValueError(
            f"model_parallel_sizes: found {wrong[0]}, and the cluster has {num_devices} devices (n_nodes*"
            "n_gpus_per_node); use sizes up to that"
        )
    return tuple(sorted(sizes))


def make_settings(
    config: ProfileConfig, models: dict[str, ModelConfig], tensor_sizes: Sequence[int], device: jax.Device
) -> Settings:
    """Returns what is to be measured on devices of this kind."""
    own = config.dtype or ("float32" if device.platform == "cpu" else "bfloat16")
    names = config.handle_names or tuple(USES)
    wanted = {program for name in names for program in USES[name]}
    if config.quick and config.handle_names is None:
        wanted &= QUICK_PROGRAMS
    defaults = ProfileConfig()
    sizes = {
        name: short if config.quick and getattr(config, name) == getattr(defaults, name) else getattr(config, name)
        for name, short in QUICK.items()
    }
    return Settings(
        name=config.name or device.device_kind.lower().replace(" ", "-"),
        num_nodes=config.n_nodes,
        devices_per_node=config.n_gpus_per_node,
        models=models,
        tensor_sizes=tuple(tensor_sizes),
        rows=sizes["batch_sizes"],
        tokens=sizes["seq_lens"],
        programs=tuple(program for program in PROGRAMS if program in wanted),
        dtypes=(own, *({"float32", "bfloat16"} - {own})),
        clock=Clock(repeats=3, least_seconds=0.002) if config.quick else Clock(repeats=config.repeats),
        quick=config.quick,
    )


@contextmanager
def show_progress(console: Console) -> Iterator[TellFn]:
    """Gives what is told of each stage: it moves a bar in a terminal, else it is a line of the log."""
    with Progress(
        TextColumn("profile"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=console,
        disable=not (console.is_interactive and is_first()),
    ) as progress:
        task = progress.add_task("", total=None)

        def tell(what: str, done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, description=what)
            if not console.is_interactive:
                logger.info("%d/%d %s", done, total, what)

        yield tell


def describe(cluster: Cluster) -> str:
    """Returns a cluster's figures in a line each."""
    gib, within, host = 2**30, cluster.within_node, cluster.to_host
    rates = ", ".join(f"{rate / 1e9:,.1f} GFLOP/s in {dtype}" for dtype, rate in cluster.matmul_flops.items())
    return "\n".join(
        [
            f"{cluster.name}: {cluster.num_nodes} x {cluster.devices_per_node} devices of "
            f"{cluster.memory_bytes / gib:.1f} GiB, each while all are busy:",
            f"  matrix products up to {rates}",
            f"  memory {cluster.memory_bandwidth / 1e9:,.1f} GB/s, host link {host.bandwidth / 1e9:,.1f} GB/s",
            f"  to a neighbour {within.bandwidth / 1e9:,.2f} GB/s after {within.latency * 1e6:,.0f} us; "
            f"a program starts in {cluster.dispatch_seconds * 1e6:,.0f} us",
        ]
    )


def _check_writable(output: Path) -> None:
    """Raises ValueError, before minutes of measuring, where the file cannot be written."""
    folder = output.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or output.is_dir():
        raise ValueError(f"output: cannot write {output}; give a .json file in a directory that is there and yours")
