"""Options of `realjax chat` and `realjax sample`, which talk to checkpoints."""

from dataclasses import dataclass
from typing import Literal

from realjax.core.generation_config import GenerationConfig
from realjax.core.option import check_conditions, check_ranges, nested, option


@dataclass(frozen=True, kw_only=True)
class TalkConfig:
    """Draws answers of checkpoints."""

    gen: GenerationConfig = nested(GenerationConfig, max_new_tokens=512)
    model_parallel_size: int = option(
        1, "accelerators that a model's layers are split over; without any, virtual CPU devices", at_least=1, at_most=64
    )
    system: str | None = option(None, "the system's message, in front of all others; it needs a chat template")
    seed: int = option(1, "of what is drawn", at_least=0, at_most=2**31 - 1)
    dtype: Literal["float32", "bfloat16"] | None = option(
        None, "what the model computes in; null is bfloat16 on accelerators, float32 on CPUs"
    )
    fileroot: str | None = option(
        None, "whose cache of compiled programs is used; null takes REALJAX_FILEROOT, else ~/.cache/realjax"
    )
    accelerator_settings: Literal["recommended", "none"] = option(
        "recommended", "as for runs: what XLA, CUDA and NCCL are told before they start"
    )
    deterministic: bool = option(False, "as for runs: on GPUs, every run of a program gives the same bits, more slowly")

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def n_nodes(self) -> int:
        """The machines in use, as the options of a run name them."""
        return 1

    @property
    def n_gpus_per_node(self) -> int:
        """The devices in use."""
        return self.model_parallel_size


@dataclass(frozen=True, kw_only=True)
class ChatConfig(TalkConfig):
    """Talks to a checkpoint in the terminal."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig(TalkConfig):
    """Answers a file of prompts with one checkpoint or several, side by side, as text and as a page."""

    gen: GenerationConfig = nested(GenerationConfig, max_new_tokens=128)
    prompts: str = option("", "a .json or .jsonl file whose rows have a prompt: a text, or a list of messages")
    num_prompts: int = option(10, "prompts that are answered: the first of the file", at_least=1, at_most=10_000)
    num_slots: int = option(16, "answers decoded at once", at_least=1, at_most=4096)
    output: str | None = option("samples.html", "the page to write; one that is there is replaced. null writes none")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompts:
            raise ValueError("prompts: no file is named; set it to a .json or .jsonl file whose rows have a prompt")
        check_conditions(
            self,
            output=(self.output is None or self.output.endswith(".html"), "a path that ends in .html, or null"),
        )
