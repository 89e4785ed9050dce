"""Options of the datasets, one dataclass per kind of data file."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from realjax.core.option import check_ranges, option

CHAT_TEMPLATE = (
    "put prompts into the tokenizer's chat template; a prompt is then the user's text, or a list of messages"
)
SEVERAL = (
    "; several, as [math=a.jsonl,code=b.jsonl] or by their files' names, are measured apart; null evaluates nothing"
)
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
class PromptAnswerDatasetConfig:
    """Rows with a `prompt` and an `answer`, for supervised fine-tuning."""

    train_path: str = option("", "training data, .json or .jsonl")
    valid_path: tuple[str, ...] | None = option(None, f"validation data, .json or .jsonl{SEVERAL}")
    max_seqlen: int = option(
        1024, "tokens of prompt, answer and end-of-text; longer rows are cut", at_least=2, at_most=2**24
    )
    train_bs_n_seqs: int = option(256, "sequences in a training batch", at_least=1, at_most=2**24)
    valid_bs_n_seqs: int = option(256, "sequences in a validation batch", at_least=1, at_most=2**24)
    pad_to_max_length: bool = option(False, "make every training row max_seqlen long; for benchmarks only")
    use_chat_template: bool = option(False, CHAT_TEMPLATE)

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class PairedComparisonDatasetConfig:
    """Rows with a `prompt`, `pos_answers` and `neg_answers`, for reward modelling and DPO."""

    train_path: str = option("", "training data, .json or .jsonl")
    valid_path: tuple[str, ...] | None = option(None, f"validation data, .json or .jsonl{SEVERAL}")
    max_pairs_per_prompt: int = option(
        2, "answer pairs drawn from a prompt each time it is used", at_least=1, at_most=10**6
    )
    max_seqlen: int = option(
        1024, "tokens of prompt, answer and end-of-text; longer rows are cut", at_least=2, at_most=2**24
    )
    train_bs_n_seqs: int = option(256, "pairs of answers in a training batch", at_least=1, at_most=2**24)
    valid_bs_n_seqs: int = option(256, "pairs of answers in a validation batch", at_least=1, at_most=2**24)
    use_chat_template: bool = option(False, CHAT_TEMPLATE)

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class LabelledAnswerDatasetConfig:
    """Rows with a `prompt`, an `answer` and a `label`, for KTO."""

    train_path: str = option("", "training data, .json or .jsonl")
    valid_path: tuple[str, ...] | None = option(None, f"validation data, .json or .jsonl{SEVERAL}")
    max_seqlen: int = option(
        1024, "tokens of prompt, answer and end-of-text; longer rows are cut", at_least=2, at_most=2**24
    )
    train_bs_n_seqs: int = option(256, "answers in a training batch", at_least=1, at_most=2**24)
    valid_bs_n_seqs: int = option(256, "answers in a validation batch", at_least=1, at_most=2**24)
    use_chat_template: bool = option(False, CHAT_TEMPLATE)

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class PromptOnlyDatasetConfig:
    """Rows with a `prompt`, for generation and reinforcement learning."""

    path: str = option("", "prompts, .json or .jsonl")
    valid_path: tuple[str, ...] | None = option(None, f"held-out prompts, whose answers evaluations score{SEVERAL}")
    max_prompt_len: int = option(
        256, "tokens of a prompt; longer ones lose those at their end", at_least=1, at_most=2**24
    )
    train_bs_n_seqs: int = option(256, "prompts in a step", at_least=1, at_most=2**24)
    pad_to_max_length: bool = option(False, "make every prompt max_prompt_len long; for benchmarks only")
    use_chat_template: bool = option(False, CHAT_TEMPLATE)

    def __post_init__(self) -> None:
        check_ranges(self)
