"""Options of generation: how answers are drawn, and the `gen` experiment."""

import re
from dataclasses import dataclass
from typing import ClassVar, TypedDict

from realjax.core.generation_config import GenerationConfig
from realjax.core.option import nested, option
from realjax.options.common import CommonExperimentConfig
from realjax.options.datasets import PromptOnlyDatasetConfig
from realjax.options.model import ModelTrainEvalConfig
from realjax.options.parallel import MFCConfig
from realjax.options.supervised import check_role


class SlotOptions(TypedDict):
    """What a generate call is told of its slots, see `dataflow.graph.Generate`."""

    num_slots: int | None
    tail_slots: int | None
    tail_tp: int | None


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(GenerationConfig):
    """How answers are drawn."""

    num_slots: int | None = option(
        None, "answers decoded at once; the next waits for a slot; null chooses", at_least=1, at_most=2**20
    )

    tail_slots: int | None = option(
        None,
        "when so few answers are left to decode, they go on in so many slots with more tensor parallelism; 0 never; "
        "null leaves it to allocation_mode=search",
        at_least=0,
        at_most=2**20,
    )
    tail_model_parallel_size: int | None = option(
        None, "devices that share each layer then; null is the most that divide the model", at_least=2, at_most=2**16
    )

    NO_EFFECT: ClassVar[dict[str, str]] = {
        "use_cuda_graph": "XLA compiles the whole decoding loop",
        "force_cudagraph_recapture": "XLA compiles the whole decoding loop once for each shape",
    }

    def slots(self) -> SlotOptions:
        """Returns how many answers are decoded at once, and where the last go on."""
        return SlotOptions(num_slots=self.num_slots, tail_slots=self.tail_slots, tail_tp=self.tail_model_parallel_size)


@dataclass(frozen=True, kw_only=True)
class GenConfig(CommonExperimentConfig):
    """Generation: one model answers prompts, into a file of JSON lines."""

    model: ModelTrainEvalConfig = nested(ModelTrainEvalConfig)
    allocation: MFCConfig = nested(MFCConfig)
    dataset: PromptOnlyDatasetConfig = nested(PromptOnlyDatasetConfig)
    gen: GenerationOptions = nested(GenerationOptions)
    num_samples: int = option(1, "answers to each prompt", at_least=1, at_most=2**16)
    stop: tuple[str, ...] = option((), "texts that end an answer; it keeps what stands before the first of them")
    output_file: str | None = option("output.jsonl", "name of the answers' file in the log directory; null writes none")

    ALIASES: ClassVar[dict[str, str]] = {**CommonExperimentConfig.ALIASES, "n": "num_samples"}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_role("model", self.model, is_critic=False, is_trained=False)
        file = self.output_file
        if file is not None and not re.fullmatch(r"[^/\x00-\x1f\x7f-\x9f]{0,190}\.jsonl", file):
            raise ValueError(
                f"output_file: found {file!r}; it needs a name that ends in .jsonl, without '/' and control "
                "characters: the file lies in the run's log directory"
            )
        if "" in self.stop:
            raise ValueError(f"stop: found {list(self.stop)}; an empty text would end every answer at once")
        if self.dataset.valid_path is not None:
            found = ",".join(self.dataset.valid_path)
            raise ValueError(f"dataset.valid_path: found '{found}'; gen answers dataset.path only")
        check_samples_differ("num_samples", self.num_samples, self.gen)

    def notices(self) -> list[str]:
        if not any("\\n" in text for text in self.stop):
            return []
        return ["stop: \\n is a backslash and an n here; in quotes, as in stop=['\\n'], it is a line break."]


def check_samples_differ(name: str, num_samples: int, gen: GenerationConfig) -> None:
    """Raises ValueError for several greedy samples of one prompt, which would all be the same."""
    if num_samples > 1 and gen.greedy:
        raise ValueError(
            f"{name}: found {num_samples} with greedy=True, whose answers to a prompt are all the same; set greedy to "
            f"False and the temperature above 0, or {name} to 1"
        )
