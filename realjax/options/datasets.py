"""Options of the datasets, one dataclass per kind of run."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from realjax.core.data_paths import split_paths
from realjax.core.option import check_ranges, option

DATA = ".jsonl, .json, .csv or .parquet, a directory, a dataset of the hub"
TRAIN_DATA = f"training data: {DATA}; several with commas"
SEVERAL = (
    "; several, as [math=a.jsonl,code=b.jsonl] or by their files' names, are measured apart; null evaluates nothing"
)
TRUNCATE = "longer rows lose their end or their beginning (left), are left out, or refused"
NAMED = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)


def name_sets(paths: Sequence[str] | None, option_name: str) -> dict[str, str]:
    """Returns the path of each held-out set by its name; the only one has an empty name where it is given none.

    A path is given as `name=path`, or the name is the file's without its ending. Raises ValueError for two of one name.
    """
    named = [(match[1], match[2]) if (match := NAMED.fullmatch(path)) else ("", path) for path in paths or ()]
    if len(named) > 1:
        named = [(name or Path(path).stem, path) for name, path in named]
    names = [name for name, _ in named]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(
            f"{option_name}: found two sets called '{repeated[0]}'; give them names of their own, as in "
            f"[first={named[0][1]},second=...]"
        )
    return dict(named)


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which rows are read, and how they become tokens."""

    valid_path: tuple[str, ...] | None = option(None, f"validation data, of the same kinds{SEVERAL}")
    split: str | None = option(
        None, "of a hub's dataset (null is train), or the files of a directory whose names begin so; null is all"
    )
    valid_split: str | None = option(None, "the same for the validation data (null is train)")
    max_samples: int | None = option(None, "rows read of each training source at most, the first ones", at_least=1)
    weights: tuple[float, ...] = option(
        (), "shares of an epoch that several sources have, such as [3,1]; all rows once"
    )
    use_chat_template: bool | None = option(
        None,
        "put prompts into the tokenizer's chat template; a prompt is then the user's text, or a list of messages; null "
        "does so where rows hold messages",
    )
    cache: bool = option(True, "keep tokens beneath fileroot, so that a later start does not make them again")

    def __post_init__(self) -> None:
        check_ranges(self)
        num_sources = len(split_paths(self.source))
        if self.weights and len(self.weights) != num_sources:
            raise ValueError(
                f"weights: found {len(self.weights)} for {num_sources} sources of data; give one for each, or none"
            )
        if any(weight <= 0 for weight in self.weights):
            raise ValueError(f"weights: found {list(self.weights)}; they must be above 0, or leave the source out")

    @property
    def source(self) -> str:
        """The training data's path or paths."""
        return str(getattr(self, "train_path", ""))


@dataclass(frozen=True, kw_only=True)
class PromptAnswerDatasetConfig(DataOptions):
    """Answers, conversations or plain texts, for supervised fine-tuning."""

    train_path: str = option("", TRAIN_DATA)
    max_seqlen: int = option(1024, "tokens of prompt, answer and end-of-text", at_least=2, at_most=2**24)
    truncate: Literal["right", "left", "drop", "error"] = option("right", TRUNCATE)
    turns: Literal["all", "last"] = option("all", "which of the assistant's turns in a conversation are learned")
    train_bs_n_seqs: int = option(256, "sequences in a training batch", at_least=1, at_most=2**24)
    valid_bs_n_seqs: int = option(256, "sequences in a validation batch", at_least=1, at_most=2**24)
    pad_to_max_length: bool = option(False, "make every training row max_seqlen long; for benchmarks only")


@dataclass(frozen=True, kw_only=True)
class PairedComparisonDatasetConfig(DataOptions):
    """Better and worse answers to prompts, for reward modelling and DPO."""

    train_path: str = option("", TRAIN_DATA)
    max_pairs_per_prompt: int = option(
        2, "answer pairs drawn from a prompt each time it is used", at_least=1, at_most=10**6
    )
    max_seqlen: int = option(1024, "tokens of prompt, answer and end-of-text", at_least=2, at_most=2**24)
    truncate: Literal["right", "left", "drop", "error"] = option("right", TRUNCATE)
    train_bs_n_seqs: int = option(256, "pairs of answers in a training batch", at_least=1, at_most=2**24)
    valid_bs_n_seqs: int = option(256, "pairs of answers in a validation batch", at_least=1, at_most=2**24)


@dataclass(frozen=True, kw_only=True)
class LabelledAnswerDatasetConfig(DataOptions):
    """Answers with a `label`, for KTO."""

    train_path: str = option("", TRAIN_DATA)
    max_seqlen: int = option(1024, "tokens of prompt, answer and end-of-text", at_least=2, at_most=2**24)
    truncate: Literal["right", "left", "drop", "error"] = option("right", TRUNCATE)
    train_bs_n_seqs: int = option(256, "answers in a training batch", at_least=1, at_most=2**24)
    valid_bs_n_seqs: int = option(256, "answers in a validation batch", at_least=1, at_most=2**24)


@dataclass(frozen=True, kw_only=True)
class PromptOnlyDatasetConfig(DataOptions):
    """Prompts, for generation and reinforcement learning."""

    path: str = option("", f"prompts: {DATA}; several with commas")
    valid_path: tuple[str, ...] | None = option(None, f"held-out prompts, whose answers evaluations score{SEVERAL}")
    max_prompt_len: int = option(256, "tokens of a prompt", at_least=1, at_most=2**24)
    truncate: Literal["left", "drop", "error"] = option(
        "left", "longer prompts lose their beginning, never their end; are left out, or refused"
    )
    train_bs_n_seqs: int = option(256, "prompts in a step", at_least=1, at_most=2**24)
    pad_to_max_length: bool = option(False, "make every prompt max_prompt_len long; for benchmarks only")

    @property
    def source(self) -> str:
        return self.path
