"""Options of `realjax data check`, which shows rows as a model will see them."""

from dataclasses import dataclass
from typing import Literal

from realjax.core.option import check_ranges, option


@dataclass(frozen=True, kw_only=True)
class DataCheckConfig:
    """Shows the rows of a data file as tokens, which of them are learned, and what would be cut."""

    model: str = option("", "whose tokenizer and chat template are used: a Hugging Face directory or hub identifier")
    experiment: Literal["sft", "rw", "kto", "ppo"] = option(
        "sft", "what the rows are for; rw stands for all that learns from pairs, ppo for all that answers prompts"
    )
    rows: int = option(3, "rows shown, the first ones", at_least=0, at_most=1000)
    split: str | None = option(None, "of a hub's dataset, or the files of a directory whose names begin so")
    max_samples: int | None = option(None, "rows read at most, the first ones", at_least=1)
    max_seqlen: int = option(1024, "tokens that are kept; of prompts, dataset.max_prompt_len", at_least=1)
    use_chat_template: bool | None = option(None, "as dataset.use_chat_template")
    turns: Literal["all", "last"] = option("all", "as dataset.turns")

    def __post_init__(self) -> None:
        check_ranges(self)
