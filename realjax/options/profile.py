"""Options of `realjax profile`, which measures a machine for the planner."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from realjax.core.option import check_conditions, check_ranges, option


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Measures this machine, and writes what the planner needs to know of it to a cluster.json."""

    n_nodes: int = option(1, "machines", at_least=1, at_most=65_536)
    n_gpus_per_node: int = option(
        8, "accelerators of one machine; without any, as many virtual CPU devices", at_least=1, at_most=4096
    )
    output: str = option("cluster.json", "the file to write; one that is there is replaced")
    name: str | None = option(None, "name of the cluster; null makes one of the kind of device")
    models: tuple[str, ...] = option(
        (), "models whose layers are measured: Hugging Face directories or hub identifiers; no weights are read"
    )
    models_jsonl: str | None = option(None, "more models: a file of rows such as {path: ...}")
    allocations_jsonl: str | None = option(
        None, "a file of rows whose model_parallel_size are the sizes of tensor parallelism to measure"
    )
    model_parallel_sizes: tuple[int, ...] | None = option(
        None, "sizes of tensor parallelism to measure; null takes 1, 2, 4 and 8 within a machine, on CPUs 1 and 2"
    )
    batch_sizes: tuple[int, ...] = option((2, 8), "numbers of rows to measure the layers with")
    seq_lens: tuple[int, ...] = option((64, 256), "tokens of a row; of a decoded one, the room in its cache")
    handle_names: tuple[Literal["generate", "inference", "train_step"], ...] | None = option(
        None, "what the layers are measured for; null is all"
    )
    dtype: Literal["float32", "bfloat16"] | None = option(
        None, "what the models compute in; null is bfloat16 on accelerators, float32 on CPUs"
    )
    repeats: int = option(7, "samples of each measurement, of which the least counts", at_least=1, at_most=1000)
    quick: bool = option(False, "a few small sizes and samples: seconds instead of minutes, and less to rely on")
    fileroot: str | None = option(
        None, "whose cache of compiled programs is used; null takes REALJAX_FILEROOT, else ~/.cache/realjax"
    )
    accelerator_settings: Literal["recommended", "none"] = option(
        "recommended", "as for runs: what XLA, CUDA and NCCL are told before they start"
    )
    deterministic: bool = option(False, "as for runs: on GPUs, every run of a program gives the same bits, more slowly")

    NO_EFFECT: ClassVar[dict[str, str]] = {
        "experiment_name": "a profile is one file, see output",
        "trial_name": "a profile is one file, see output",
        "mode": "realjax profile runs in the processes that it is started in",
        "interfaces_jsonl": "a layer costs the same in every algorithm",
        "datasets_jsonl": "the batches are made up",
        "n_mbs": "the layers are measured for the rows of one micro-batch: see batch_sizes",
        "allocation_mode": "single layers are measured, and the planner puts them together",
    }

    def __post_init__(self) -> None:
        check_ranges(self)
        check_conditions(
            self,
            output=(self.output.endswith(".json"), "a path that ends in .json"),
            batch_sizes=(bool(self.batch_sizes) and min(self.batch_sizes, default=0) >= 1, "numbers of at least 1"),
            seq_lens=(
                min(self.seq_lens, default=0) >= 64 and all(n % 32 == 0 for n in self.seq_lens),
                "multiples of 32 from 64 on: a chunk of tokens is decoded behind what a row has",
            ),
            model_parallel_sizes=(min(self.model_parallel_sizes or (1,)) >= 1, "numbers of at least 1"),
        )
