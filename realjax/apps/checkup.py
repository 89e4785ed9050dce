"""What could keep a run from working: versions, devices, links, directories, clocks; a `Finding` for each."""

import importlib.metadata
import logging
import os
import shutil
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from packaging.requirements import Requirement

from realjax.allocation.params import count_params
from realjax.core.manifest import MANIFEST, find_damage
from realjax.core.processes import format_numbers, from_first, gather
from realjax.dataflow.run import RunSpec
from realjax.launch.accelerators import find_accelerator

logger = logging.getLogger("realjax.doctor")
MOST_SKEW_SECONDS = 2.0
SEEN_SECONDS = 20.0  # a file of one machine has to be seen on the others after so long
REDUCED_BYTES = 1 << 24  # of each device
STATE_BYTES, CHECKPOINT_BYTES = 12, 4  # of a parameter: float32 with two moments; exported as it is, at most
DRIVER = Path("/proc/driver/nvidia/version")
NCCL_PACKAGES = ("nvidia-nccl-cu13", "nvidia-nccl-cu12")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one look gave: `is_well` and how it is, or what is wrong and what helps."""

    name: str
    is_well: bool
    text: str

    def __str__(self) -> str:
        return f"{'ok     ' if self.is_well else 'PROBLEM'} {self.name}: {self.text}"


def look(root: Path, devices: Sequence[jax.Device], needed_bytes: int) -> list[Finding]:
    """Returns what each look gave. Every process must call this."""
    looks: list[Callable[[], Finding]] = [
        check_versions,
        lambda: check_accelerators(devices),
        check_driver,
        lambda: check_bandwidth(devices),
        lambda: check_files(root),
        lambda: check_disk(root, needed_bytes),
        check_clocks,
    ]
    return [one() for one in looks]


def warn_before_run(spec: RunSpec) -> None:
    """Logs a warning for each problem that is found in no time. Every process must call this."""
    root = spec.paths.logs
    for finding in (check_disk(root, saved_bytes(spec)), check_clocks()):
        if not finding.is_well:
            logger.warning("%s: %s", finding.name, finding.text)


def saved_bytes(spec: RunSpec) -> int:
    """Returns what the run's training states and one checkpoint of each role take on the disk, roughly."""
    if spec.benchmark_steps is not None:
        return 0
    trained = [count_params(role.config) for role in spec.roles.values() if role.optimizer is not None]
    # A new state is written before the oldest goes.
    return sum(trained) * (STATE_BYTES * (spec.max_recover_saves + 1) + CHECKPOINT_BYTES)


def check_versions() -> Finding:
    """Returns whether the packages are of versions that realjax takes."""
    try:
        wanted = [Requirement(text) for text in importlib.metadata.requires("realjax") or ()]
    except importlib.metadata.PackageNotFoundError:
        return Finding(name="versions", is_well=True, text="not looked at, since realjax itself is not installed")
    wrong = []
    for one in wanted:
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        found = _version(one.name)
        if found is None or not one.specifier.contains(found, prereleases=True):
            wrong.append(f"{one.name} {found or 'missing'}, needs {one.specifier}")
    versions = ", ".join(f"{name} {_version(name)}" for name in ("jax", "jaxlib", "flax", "orbax-checkpoint"))
    text = f"{'; '.join(wrong)}; install realjax again" if wrong else versions
    return Finding(name="versions", is_well=not wrong, text=text)


def check_accelerators(devices: Sequence[jax.Device]) -> Finding:
    """Returns whether the devices are alike, and of the accelerator that the machine has."""
    kinds = sorted({device.device_kind for device in devices})
    text = f"{len(devices)} x {', '.join(kinds)} in {jax.process_count()} processes"
    accelerator = find_accelerator(os.environ)
    if len(kinds) > 1:
        return Finding(name="accelerators", is_well=False, text=f"{text}; give a run devices of one kind")
    if accelerator is not None and jax.default_backend() == "cpu":
        text = f"JAX uses the CPU, but there is {accelerator.name}; look at JAX's own warning, or set JAX_PLATFORMS"
        return Finding(name="accelerators", is_well=False, text=text)
    return Finding(name="accelerators", is_well=True, text=text)


def check_driver() -> Finding:
    """Returns the versions of driver and NCCL, which must be the same in every process."""
    driver = DRIVER.read_text(encoding="utf-8").splitlines()[0] if DRIVER.exists() else "no NVIDIA driver"
    nccl = next((f"NCCL {found}" for name in NCCL_PACKAGES if (found := _version(name))), "no NCCL of a package")
    text = f"{driver}, {nccl}"
    others = _differing(text)
    if others:
        return Finding(name="driver", is_well=False, text=f"{text}, another one in processes {others}; make them equal")
    return Finding(name="driver", is_well=True, text=text)


def check_bandwidth(devices: Sequence[jax.Device]) -> Finding:
    """Returns what an all-reduce over all devices moves: bytes of each device by seconds, as NCCL's tests count it."""
    if len(devices) == 1:
        return Finding(name="all-reduce", is_well=True, text="one device has nobody to talk to")
    mesh = Mesh(np.array(devices, dtype=object), ("all",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("all")
    make = lambda: jnp.ones((len(devices), REDUCED_BYTES // 4), jnp.float32)
    x = jax.jit(make, out_shardings=NamedSharding(mesh, spec))()
    add = lambda x: jax.lax.psum(x, "all")
    reduce = jax.jit(jax.shard_map(add, mesh=mesh, in_specs=spec, out_specs=PartitionSpec()))
    jax.block_until_ready(reduce(x))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(reduce(x))
        seconds.append(time.perf_counter() - start)
    rate = 2 * (len(devices) - 1) / len(devices) * REDUCED_BYTES / min(seconds) / 1e9
    text = f"{rate:.2f} GB/s over {len(devices)} devices, {REDUCED_BYTES >> 20} MiB of each"
    return Finding(name="all-reduce", is_well=True, text=text)


def check_files(root: Path) -> Finding:
    """Returns whether every process can write below `root`, and sees what the first one writes there."""
    folder = root / f".doctor-{int(from_first(time.time_ns() % 10**9))}"
    error = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / str(jax.process_index())).write_text("here")
    except OSError as failed:
        error = failed.strerror or str(failed)
    cannot = np.flatnonzero(gather(np.array(float(bool(error)))))
    if cannot.size:
        why = f" ({error})" if error else ""
        text = f"{root} cannot be written by process {format_numbers(cannot.tolist())}{why}; set fileroot"
        return Finding(name="files", is_well=False, text=text)
    deadline = time.monotonic() + SEEN_SECONDS
    others = [folder / str(i) for i in range(jax.process_count())]
    while not (seen := all(path.exists() for path in others)) and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = np.flatnonzero(gather(np.array(float(not seen))))
    shutil.rmtree(folder, ignore_errors=True)
    if blind.size:
        text = f"{root} is not the same directory everywhere: process {format_numbers(blind.tolist())} misses files; "
        return Finding(name="files", is_well=False, text=f"{text}set fileroot to one that all machines share")
    return Finding(name="files", is_well=True, text=f"{root} is seen by all {jax.process_count()} processes")


def check_disk(root: Path, needed_bytes: int) -> Finding:
    """Returns whether there is room for what a run is going to save."""
    there = next(path for path in (root, *root.parents) if path.exists())
    free = from_first(float(shutil.disk_usage(there).free))
    text = f"{free / 1e9:.1f} GB free at {root}, {needed_bytes / 1e9:.1f} GB needed for saves"
    if free < needed_bytes:
        text += "; make room, lower max_recover_saves_to_keep, or set fileroot"
    return Finding(name="disk", is_well=free >= needed_bytes, text=text)


def check_models(spec: RunSpec) -> Finding:
    """Returns whether the models that a run starts from are as their checksums say, where they have some; every process
    reads its share.
    """
    paths = sorted({role.path for role in spec.roles.values() if (role.path / MANIFEST).exists()})
    share = {"share": jax.process_index(), "num_shares": jax.process_count()}
    damages = [find_damage(path, **share) for path in paths]
    counts = gather(np.array([0.0, *(float(damage is not None) for damage in damages)])).sum(0)[1:]
    broken = [
        f"{path} is not as it was written" + (f" ({damage})" if damage else "")
        for path, damage, count in zip(paths, damages, counts, strict=True)
        if count
    ]
    if broken:
        return Finding(name="models", is_well=False, text=f"{'; '.join(broken)}; give another checkpoint")
    return Finding(name="models", is_well=True, text=f"{len(paths)} with checksums are as they were written")


def check_clocks() -> Finding:
    """Returns whether the machines' clocks agree: their logs are read side by side."""
    from_first(0)  # all ask at the same moment
    times = gather(np.array(time.time()))
    skew = float(times.max() - times.min())
    text = f"{skew:.2f} s apart"
    if skew > MOST_SKEW_SECONDS:
        text += "; have a time service set them"
    return Finding(name="clocks", is_well=skew <= MOST_SKEW_SECONDS, text=text)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _differing(text: str) -> str:
    """Returns the numbers of the processes whose text is another one than the first's; every process gives its own."""
    digests = gather(np.array(float(zlib.crc32(text.encode()))))
    return format_numbers(np.flatnonzero(digests != digests[0]).tolist())
