"""Options of one model function call: parallel sizes, micro-batches, devices; and what `allocation_mode` sets."""

import re
from dataclasses import dataclass

from realjax.core.layout import ParallelStrategy
from realjax.options.fields import check_bounds, group, option

SIZES_PATTERN = re.compile(
    r"(?:([dpm])([1-9]\d{0,8}))(?:(?!\1)([dpm])([1-9]\d{0,8}))(?:(?!\1|\3)([dpm])([1-9]\d{0,8}))"
)
NAMED_MODES = ("manual", "pipe_model", "pipe_data", "heuristic", "search")


@dataclass(frozen=True, kw_only=True)
class ParallelismConfig:
    """How a call is split over its devices; the product of the three sizes is their number."""

    model_parallel_size: int = option(
        1, "devices that share each layer (tensor parallelism)", at_least=1, at_most=2**16
    )
    pipeline_parallel_size: int = option(1, "stages that the layers are cut into", at_least=1, at_most=2**16)
    data_parallel_size: int = option(
        1, "groups of devices that each take a part of the batch", at_least=1, at_most=2**16
    )
    use_sequence_parallel: bool = option(
        False, "also split norms and residuals along the sequence over model_parallel_size"
    )

    def __post_init__(self) -> None:
        check_bounds(self)

    @property
    def num_devices(self) -> int:
        return self.data_parallel_size * self.pipeline_parallel_size * self.model_parallel_size

    def strategy(self, zero_stage: int = 0) -> ParallelStrategy:
        """Returns the strategy of these sizes."""
        return ParallelStrategy(
            dp=self.data_parallel_size,
            pp=self.pipeline_parallel_size,
            tp=self.model_parallel_size,
            sequence_parallel=self.use_sequence_parallel,
            zero_stage=zero_stage,
        )


@dataclass(frozen=True, kw_only=True)
class MFCConfig:
    """Where and how one model function call runs."""

    parallel: ParallelismConfig = group(ParallelismConfig)
    n_mbs: int | None = option(None, "micro-batches that a batch is computed in; null is 1", at_least=1, at_most=2**16)
    max_tokens_per_mb: int | None = option(
        None,
        "largest micro-batch in tokens, over all devices; sets the number of micro-batches instead of n_mbs",
        at_least=1,
    )
    device_mesh: str | None = option(
        None, "devices of this call, such as NODE01:0,1,2,3; null is all (manual mode only)"
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.n_mbs is not None and self.max_tokens_per_mb is not None:
            raise ValueError(
                f"max_tokens_per_mb: found {self.max_tokens_per_mb} together with n_mbs={self.n_mbs}; give one of them"
            )


def resolve_parallelism(
    allocation_mode: str, manual: ParallelismConfig, *, n_nodes: int, n_gpus_per_node: int, is_train: bool
) -> ParallelismConfig:
    """Returns the sizes of a call under `allocation_mode`; `manual` holds those it was given itself.

    Symmetric modes use all devices. As in ReaL they switch sequence parallelism on for training with more than one
    model shard. ValueError for an unknown mode, or one that is not a rule about sizes (heuristic, search).
    """
    if allocation_mode == "manual":
        return manual
    sizes = {
        "pipe_model": {"d": 1, "p": n_nodes, "m": n_gpus_per_node},
        "pipe_data": {"d": n_gpus_per_node, "p": n_nodes, "m": 1},
    }.get(allocation_mode) or _read_sizes(allocation_mode)
    return ParallelismConfig(
        data_parallel_size=sizes["d"],
        pipeline_parallel_size=sizes["p"],
        model_parallel_size=sizes["m"],
        use_sequence_parallel=is_train and sizes["m"] > 1,
    )


def _read_sizes(allocation_mode: str) -> dict[str, int]:
    match = SIZES_PATTERN.fullmatch(allocation_mode)
    if match is None:
        raise ValueError(
            f"allocation_mode: found {allocation_mode!r}; it needs {', '.join(NAMED_MODES)}, or the sizes of all three "
            "kinds of parallelism in any order, such as d2p1m4 (data 2, pipeline 1, model 4)"
        )
    letters_and_sizes = match.groups()
    return {letter: int(size) for letter, size in zip(letters_and_sizes[::2], letters_and_sizes[1::2], strict=True)}
