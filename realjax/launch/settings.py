"""What XLA, CUDA and NCCL are told before they start: recommended settings for each kind of device, and determinism.

Each was found known to jaxlib 0.10.2, 0.11.2 and 0.12.0: an unknown flag ends the process. docs/accelerators.md has the
sources, what each changes in compiled programs, and what is left out because it changes nothing.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from realjax.launch.accelerators import CORES, OTHER, Accelerator

XLA_FLAGS = "XLA_FLAGS"
FLAG = re.compile(r"(?<!\S)--?(?P<name>\w+)(?:=(?P<value>\S*))?")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A flag of XLA, where the name begins with `xla_`, or a variable of the environment."""

    name: str
    value: str
    why: str
    architectures: frozenset[str] | None = None  # None: every NVIDIA GPU; CORES: virtual devices, see `find_cores`
    for_several: bool = False  # only where one process drives several GPUs
    other_name: str | None = None  # an older one, by which a user may have set it

    @property
    def is_flag(self) -> bool:
        """True for a flag of XLA, False for a variable."""
        return self.name.startswith("xla_")

    def __str__(self) -> str:
        return f"--{self.name}={self.value}" if self.is_flag else f"{self.name}={self.value}"


RECOMMENDED = (
    Setting(
        name="XLA_CLIENT_MEM_FRACTION",
        value="0.9",
        why="JAX takes 75% of a GPU's memory if nothing is said; the rest is for NCCL's buffers and CUDA's own",
        other_name="XLA_PYTHON_CLIENT_MEM_FRACTION",
    ),
    Setting(
        name="CUDA_DEVICE_MAX_CONNECTIONS",
        value="1",
        why="work reaches the GPU in the order of its launch, so a collective does not wait behind later products",
        architectures=frozenset({"ampere", "hopper"}),
    ),
    Setting(
        name="NCCL_LAUNCH_MODE",
        value="GROUP",
        why="a process that drives several GPUs may hang when their collectives are launched one by one",
        for_several=True,
    ),
    Setting(
        name="xla_disable_hlo_passes",
        value="triton-softmax-rewriter",
        why="without cuDNN's attention XLA tries tiles for the softmax of every block: programs compile for minutes",
        architectures=frozenset({"ampere", OTHER}),
    ),
    Setting(
        name="xla_cpu_multi_thread_eigen",
        value="false",
        why="as many devices as cores: each has one for itself, and no operation waits for a second thread",
        architectures=frozenset({CORES}),
    ),
)
DETERMINISTIC = Setting(
    name="xla_gpu_deterministic_ops",
    value="true",
    why="every run of a program gives the same bits: no atomic sums, no kernels chosen by timing",
)


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The variables to set, and lines that say which settings they hold and which the user's own were left."""

    variables: Mapping[str, str]
    notices: tuple[str, ...] = ()


def choose_environment(
    environ: Mapping[str, str], accelerator: Accelerator | None, num_gpus: int, *, recommend: bool, deterministic: bool
) -> Environment:
    """Returns what a process that drives `num_gpus` of the devices sets before its backend starts.

    What the user's environment has already stays. Raises ValueError where it says the opposite of `deterministic`.
    """
    if accelerator is None:
        return Environment(variables={})
    wanted = [one for one in RECOMMENDED if recommend and _fits(one, accelerator, num_gpus)]
    wanted += [DETERMINISTIC] * (deterministic and accelerator.architecture != CORES)
    text = read_flags(environ.get(XLA_FLAGS, ""))
    given = {found["name"]: "true" if found["value"] is None else found["value"] for found in FLAG.finditer(text)}
    given |= {name: value for name, value in environ.items() if name != XLA_FLAGS}
    if deterministic and given.get(DETERMINISTIC.name, "true").lower() not in ("true", "1"):
        raise ValueError(
            f"deterministic: found True, but {XLA_FLAGS} has {DETERMINISTIC.name}={given[DETERMINISTIC.name]}; "
            "take it out of there, or set deterministic=False"
        )
    own = {one: found for one in wanted if (found := _find(one, given)) is not None}
    new = [one for one in wanted if one not in own]
    variables = {one.name: one.value for one in new if not one.is_flag}
    if flags := [str(one) for one in new if one.is_flag]:
        variables[XLA_FLAGS] = " ".join([text, *flags]).strip()
    return Environment(variables=variables, notices=tuple(_describe(accelerator, wanted, own)))


def read_flags(text: str) -> str:
    """Returns the flags that a value of XLA_FLAGS, which may name a file, stands for; ValueError for no such file."""
    if not text.strip() or text.lstrip().startswith("-"):
        return text.strip()
    try:
        return " ".join(Path(text).read_text(encoding="utf-8").split())
    except OSError as error:
        raise ValueError(f"{XLA_FLAGS}: {text!r} is read as a file of flags, and cannot be: {error}") from error


def _fits(setting: Setting, accelerator: Accelerator, num_gpus: int) -> bool:
    is_gpu = accelerator.architecture != CORES
    is_for_kind = is_gpu if setting.architectures is None else accelerator.architecture in setting.architectures
    return is_for_kind and (num_gpus > 1 or not setting.for_several)


def _find(setting: Setting, given: Mapping[str, str]) -> str | None:
    """Returns the value that the user gave, by either name."""
    return given.get(setting.name, given.get(setting.other_name or setting.name))


def _describe(accelerator: Accelerator, wanted: list[Setting], own: Mapping[Setting, str]) -> list[str]:
    # Virtual devices stand in for others: what they are told is no news to who runs on them.
    if not wanted or accelerator.architecture == CORES:
        return []
    # Found with the wanted value: an earlier run of this process set it, or it makes no difference.
    in_force = [str(one) for one in wanted if own.get(one, one.value) == one.value]
    lines = [f"Settings for {accelerator.name}: {' '.join(in_force) or 'none'} (docs/accelerators.md)."]
    if others := [f"{one.name}={value}" for one, value in own.items() if value != one.value]:
        lines.append(f"The environment has other values, which stay: {' '.join(others)}.")
    return lines
