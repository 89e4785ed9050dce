"""From passages to token sequences of bounded length, with the tokens that are learned."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from realjax.data.chat import Passage, Turns, special_texts
from realjax.data.tokens import encode_passages, eos_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Truncate = Literal["right", "left", "drop", "error"]


@dataclass(frozen=True, kw_only=True)
class SequenceForm:
    """How rows become sequences of at most `max_seqlen` tokens.

    `use_chat_template` None puts conversations into the tokenizer's template, and leaves texts as they are. `turns`
    says which of the assistant's turns are learned, `truncate` what becomes of longer sequences. `pad_to_max_length`
    (benchmarks) extends every sequence with EOS tokens that are no targets.
    """

    max_seqlen: int
    use_chat_template: bool | None = None
    turns: Turns = "all"
    truncate: Truncate = "right"
    pad_to_max_length: bool = False


@dataclass(frozen=True, kw_only=True)
class TokenSequence:
    """The tokens of one passage, cut, and which are learned; `whole_len` is their number before the cut."""

    tokens: np.ndarray  # int32 [L]
    loss_mask: np.ndarray  # bool [L]
    whole_len: int

    @property
    def is_cut(self) -> bool:
        """True where the passage has more tokens than are kept."""
        return self.whole_len > len(self.tokens)

    @property
    def answer_start(self) -> int:
        """The first token that is learned; L where none is."""
        return int(np.argmax(self.loss_mask)) if self.loss_mask.any() else len(self.tokens)


def make_sequences(
    passages: Sequence[Passage], tokenizer: "PreTrainedTokenizerBase", *, max_seqlen: int, cuts_left: bool = False
) -> Iterator[TokenSequence]:
    """Yields each passage's tokens, cut on the right, or on the left behind BOS.

    A passage that is learned to its end gets EOS, learned too, unless it has it already; in a template any special
    token at its end ends it. A sequence's first token is predicted from nothing, so it is never learned. Raises
    ValueError for a tokenizer without EOS.
    """
    eos = eos_id(tokenizer)
    if max_seqlen < 1:
        raise ValueError(f"dataset.max_seqlen: found {max_seqlen}; needed at least 1")
    is_rendered = bool(passages) and passages[0].is_rendered
    ends = {eos, *_special_ids(tokenizer)} if is_rendered else {eos}
    for passage, encoded in zip(passages, encode_passages(passages, tokenizer), strict=True):
        ids, mask = encoded.tokens, np.zeros(len(encoded.tokens) + 1, np.bool_)
        for start, end in encoded.spans:
            mask[start:end] = True
        if passage.learns_end:
            ids = ids if ids and ids[-1] in ends else [*ids, eos]
            mask[min(encoded.spans[-1][0], len(ids) - 1) : len(ids)] = True
        mask[0] = False
        tokens, mask = np.array(ids, np.int32), mask[: len(ids)]
        kept = _choose_kept(tokens, max_seqlen, tokenizer.bos_token_id) if cuts_left else slice(max_seqlen)
        mask = mask[kept]
        mask[:1] = False
        yield TokenSequence(tokens=tokens[kept], loss_mask=mask, whole_len=len(ids))


def _choose_kept(tokens: np.ndarray, most: int, bos: object) -> np.ndarray:
    """Returns the places of the last tokens, and of BOS before them."""
    places = np.arange(len(tokens))
    if len(tokens) <= most:
        return places
    front = 1 if most > 1 and tokens[0] == bos else 0
    return np.concatenate([places[:front], places[len(tokens) - most + front :]])


def _special_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    found = tokenizer.convert_tokens_to_ids(list(special_texts(tokenizer)))
    return found if isinstance(found, list) else [found]


def refuse_no_answers(subject: str, num_rows: int, num_empty: int, max_seqlen: int) -> None:
    """Raises ValueError where all rows are among those that keep no token of their answers."""
    if num_empty == num_rows:
        raise ValueError(
            f"{subject}: no row of {num_rows} has an answer token within dataset.max_seqlen={max_seqlen}, so there is "
            "nothing to learn; raise dataset.max_seqlen or shorten the prompts"
        )


def refuse_long(subject: str, row_id: object, num_tokens: int, max_seqlen: int) -> None:
    """Raises ValueError for a sequence that `truncate=error` does not allow to be cut."""
    raise ValueError(
        f"{subject}: the row with id {row_id!r} has {num_tokens} tokens, more than dataset.max_seqlen={max_seqlen}, "
        "and dataset.truncate=error; raise max_seqlen, shorten the row, or set truncate to right, left or drop"
    )
