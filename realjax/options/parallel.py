"""Options of one model function call: parallel sizes, micro-batches, devices."""

import math
import re
from dataclasses import dataclass

from realjax.core.layout import ParallelStrategy
from realjax.core.option import check_ranges, nested, option
from realjax.dataflow.graph import MicroBatches
from realjax.dataflow.run import AllocationOptions, CallPlacement
from realjax.options.common import CommonExperimentConfig
from realjax.options.fields import find_instances


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
    expert_parallel_size: int = option(
        1,
        "of these groups, how many share a layer's experts; it divides data_parallel_size and the model's experts",
        at_least=1,
        at_most=2**16,
    )
    use_sequence_parallel: bool = option(
        False, "also split norms and residuals along the sequence over model_parallel_size"
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.data_parallel_size % self.expert_parallel_size:
            raise ValueError(
                f"expert_parallel_size: found {self.expert_parallel_size}, which does not divide data_parallel_size="
                f"{self.data_parallel_size}; the devices that share experts are among those that share the batch"
            )

    def strategy(self) -> ParallelStrategy:
        """Returns the strategy of these sizes."""
        return ParallelStrategy(
            dp=self.data_parallel_size,
            pp=self.pipeline_parallel_size,
            tp=self.model_parallel_size,
            ep=self.expert_parallel_size,
            sequence_parallel=self.use_sequence_parallel,
        )


@dataclass(frozen=True, kw_only=True)
class MFCConfig:
    """Where and how one model function call runs."""

    parallel: ParallelismConfig = nested(ParallelismConfig)
    n_mbs: int | None = option(
        None,
        "micro-batches that a batch is computed in; null: as few as the memory has room for",
        at_least=1,
        at_most=2**16,
    )
    max_tokens_per_mb: int | None = option(
        None,
        "largest micro-batch in tokens, over all devices; sets the number of micro-batches instead of n_mbs",
        at_least=1,
    )
    device_mesh: str | None = option(
        None, "devices of this call, such as NODE01:0,1,2,3; null is all (manual mode only)"
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.n_mbs is not None and self.max_tokens_per_mb is not None:
            raise ValueError(
                f"max_tokens_per_mb: found {self.max_tokens_per_mb} together with n_mbs={self.n_mbs}; give one of them"
            )

    @property
    def micro_batches(self) -> MicroBatches:
        """How the call splits its batch."""
        return MicroBatches(count=self.n_mbs, max_tokens=self.max_tokens_per_mb)


def data_parallel(num_devices: int) -> str:
    """Returns the mode in which every device takes a part of the batch."""
    return f"d{num_devices}p1m1"


def count_asked(config: CommonExperimentConfig) -> int | None:
    """Returns the devices of the run that its sizes name, None where they are those that there are."""
    if config.allocation_mode == "manual":
        calls = [call for name, call in find_instances(config, MFCConfig).items() if name not in config.unused]
        meshes = [call.device_mesh for call in calls if call.device_mesh is not None]
        numbers = [int(number) for mesh in meshes for number in re.findall(r"\d+", mesh.partition(":")[2])]
        on_meshes = config.n_nodes * (1 + max(numbers)) if numbers else 8 * config.n_nodes if meshes else 0
        return max(on_meshes, *(call.parallel.strategy().size for call in calls))
    sizes = re.findall(r"[dpm](\d+)", config.allocation_mode or "")
    return math.prod(map(int, sizes)) if len(sizes) == 3 else None


def allocation_options(config: CommonExperimentConfig) -> AllocationOptions:
    """Returns what `config` says of its machines and of where its calls run.

    Where the machine is left open, it is what the sizes ask for, or one device: `resolve_machine` knows what is there.
    """
    asked = count_asked(config) or config.n_nodes
    per_node = config.n_gpus_per_node or -(-asked // config.n_nodes)
    calls = {name: call for name, call in find_instances(config, MFCConfig).items() if name not in config.unused}
    return AllocationOptions(
        mode=config.allocation_mode or data_parallel(config.n_nodes * per_node),
        n_nodes=config.n_nodes,
        n_gpus_per_node=per_node,
        nodelist=config.nodelist,
        planner=config.planner,
        use_cache=config.allocation_use_cache,
        calls={
            name: CallPlacement(strategy=call.parallel.strategy(), device_mesh=call.device_mesh)
            for name, call in calls.items()
        },
    )
