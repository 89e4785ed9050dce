"""The accelerator of this machine, told without starting JAX's backend, which reads its settings as it starts."""

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURES = {
    "ampere": re.compile(r"\bA(100|800|30)\b"),
    "hopper": re.compile(r"\bG?H(100|200|800|20)\b"),
    "blackwell": re.compile(r"\bG?B(100|200|300)\b"),
}
OTHER, CORES = "other", "cores"
UNKNOWN = "NVIDIA GPU"


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """A kind of GPU, named as its driver names it; its `architecture` is one of the table's, or "other".

    Of virtual devices, see `find_cores`, it is "cores".
    """

    name: str
    architecture: str


def find_accelerator(environ: Mapping[str, str], root: Path = Path("/")) -> Accelerator | None:
    """Returns the kind of GPU that JAX is going to use, None where it is going to use none.

    JAX has no plugin for GPUs, or the environment hides them, or the driver (its files are below `root`) is not there.
    """
    platforms = environ.get("JAX_PLATFORMS", "").split(",")
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    is_asked_for = platforms == [""] or not {"cuda", "gpu"}.isdisjoint(platforms)
    if not is_asked_for or visible in ("", "-1") or not _has_plugin():
        return None
    driver = root / "proc/driver/nvidia"
    names = {name for path in driver.glob("gpus/*/information") if (name := _read_model(path))}
    if len(names) == 1:
        (name,) = names
        fitting = (one for one, pattern in ARCHITECTURES.items() if pattern.search(name))
        return Accelerator(name=name, architecture=next(fitting, OTHER))
    # A container may hide what the GPUs are called; with several kinds none is every process's.
    is_there = driver.exists() or (root / "dev/nvidiactl").exists() or (root / "dev/dxg").exists()
    return Accelerator(name=UNKNOWN, architecture=OTHER) if is_there or visible is not None else None


def find_cores(num_devices: int, num_cores: int) -> Accelerator | None:
    """Returns the kind of a machine's virtual devices where each can have a core of its own, None where one has more.

    A process that may use a single core has nothing to share out.
    """
    if not 1 < num_cores <= num_devices:
        return None
    return Accelerator(name=f"{num_devices} virtual devices on {num_cores} cores", architecture=CORES)


def count_accelerators(environ: Mapping[str, str], processes_per_node: int = 1, root: Path = Path("/")) -> int:
    """Returns how many GPUs of this machine a run is going to use: those that the environment shows, else all.

    A cluster may show each of several processes its share only. 0 where JAX is going to use none.
    """
    if find_accelerator(environ, root) is None:
        return 0
    driver = len(list((root / "proc/driver/nvidia").glob("gpus/*/information")))
    present = driver or len(list((root / "dev").glob("nvidia[0-9]*"))) or 1
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    num_visible = len(visible.split(","))
    is_share = num_visible * processes_per_node <= present
    return num_visible * processes_per_node if is_share else num_visible


def _has_plugin() -> bool:
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") is not None for version in (12, 13))


def _read_model(information: Path) -> str | None:
    """Returns what stands behind "Model:" in a file of the driver."""
    found = re.search(r"^Model:\s*(.*\S)", information.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return found[1] if found else None
