"""The options of `realjax doctor`."""

from dataclasses import dataclass
from typing import Literal

from realjax.core.option import check_ranges, option


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """What is to be looked at: so many devices, and the directory of runs."""

    n_nodes: int = option(1, "machines", at_least=1, at_most=65_536)
    n_gpus_per_node: int = option(
        8, "accelerators of one machine; without any, as many virtual CPU devices", at_least=1, at_most=4096
    )
    fileroot: str | None = option(
        None, "directory of logs and checkpoints; null takes REALJAX_FILEROOT, else ~/.cache/realjax"
    )
    accelerator_settings: Literal["recommended", "none"] = option(
        "recommended", "as for runs: what XLA, CUDA and NCCL are told before they start"
    )
    deterministic: bool = option(False, "as for runs: on GPUs, every run of a program gives the same bits, more slowly")

    def __post_init__(self) -> None:
        check_ranges(self)
