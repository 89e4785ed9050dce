"""Tokenised examples of each dataset kind: what the loader packs."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from realjax.core.identity import digest
from realjax.data.chat import check_messages, prompt_kinds, prompt_texts
from realjax.data.jsonl import load_rows
from realjax.data.packing import MOST_TOKENS
from realjax.data.tokens import Encoded, encode, eos_id, tell_repeats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

# Offsets cost ~150 bytes a token while a call lasts: a bound on rows per call bounds the memory of large files.
_ROWS_PER_CALL = 16_384


def order_examples(num_examples: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """Returns the indices of examples in the order of an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(num_examples) if shuffle else np.arange(num_examples)


def refuse_no_answers(subject: str, num_rows: int, num_empty: int, max_seqlen: int) -> None:
    """Raises ValueError where all rows are among those that keep no token of their answers."""
    if num_empty == num_rows:
        raise ValueError(
            f"{subject}: no row of {num_rows} has an answer token within dataset.max_seqlen={max_seqlen}, so there is "
            "nothing to learn; raise dataset.max_seqlen or shorten the prompts"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class FlatDataset:
    """N examples of one sequence each, flat: example i is `tokens[offsets[i]:offsets[i+1]]`."""

    ids: tuple[str | int, ...]
    tokens: np.ndarray  # int32, all examples one after the other
    offsets: np.ndarray  # int64 [N+1]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def fingerprint(self) -> str:
        """A text that changes with the ids and tokens."""
        return digest(repr(self.ids), self.tokens, self.offsets)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int32 [N]."""
        return np.diff(self.offsets).astype(np.int32)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.lengths.max())

    def order(self, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
        """Indices of the examples in the order of an epoch."""
        return order_examples(len(self), seed, epoch, shuffle)

    def take_tokens(self, index: int) -> np.ndarray:
        """Tokens of one example, int32 [L]."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptAnswerDataset(FlatDataset):
    """Examples for SFT, each learned in its target span."""

    target_spans: np.ndarray  # int32 [N, 2]: first target and one past the last, within the example

    @property
    def fingerprint(self) -> str:
        return digest(super().fingerprint, self.target_spans)

    def example(self, index: int) -> dict[str, np.ndarray]:
        """`tokens` int32 [L] and `loss_mask` bool [L], True at the answer's tokens and EOS."""
        tokens = self.take_tokens(index)
        loss_mask = np.zeros(len(tokens), np.bool_)
        loss_mask[slice(*self.target_spans[index])] = True
        return {"tokens": tokens, "loss_mask": loss_mask}


def load_prompt_answer(
    path: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_seqlen: int,
    pad_to_max_length: bool = False,
    use_chat_template: bool = False,
    name: str = "dataset.train_path",
) -> PromptAnswerDataset:
    """Dataset of the file's `prompt`+`answer`+EOS, cut on the right to `max_seqlen` tokens.

    With `use_chat_template` prompts are put into the template, as `load_prompts` does. `pad_to_max_length` (benchmarks)
    extends every example to `max_seqlen` with EOS tokens that are no targets. Raises ValueError for a bad file (see
    `load_rows`), a tokenizer without EOS, or when no row keeps a target.
    """
    eos = eos_id(tokenizer)
    kinds = {"prompt": prompt_kinds(tokenizer, use_chat_template), "answer": str}
    rows = load_rows(path, kinds, name, check_messages)
    if pad_to_max_length and len(rows) * max_seqlen > MOST_TOKENS:
        raise ValueError(
            f"dataset.pad_to_max_length: {len(rows)} rows of max_seqlen={max_seqlen} tokens are more than "
            f"{MOST_TOKENS}; lower dataset.max_seqlen, or set it to False"
        )
    answers = [row["answer"] for row in rows]
    prompts = prompt_texts(rows, tokenizer, use_chat_template=use_chat_template, subject=f"{name}: {path!r}")
    tell_repeats([] if use_chat_template else prompts, answers, tokenizer, name)
    tokens: list[np.ndarray] = []
    spans: list[tuple[int, int]] = []
    sequences = tokenize_answers(prompts, answers, tokenizer, max_seqlen=max_seqlen, is_rendered=use_chat_template)
    for example, answer_start in sequences:
        # A sequence's first token is predicted from nothing, so it is no target even when the prompt is empty.
        spans.append((max(answer_start, 1), len(example)))
        if pad_to_max_length:
            example = np.pad(example, (0, max_seqlen - len(example)), constant_values=eos)
        tokens.append(example)

    num_empty = sum(start >= end for start, end in spans)
    refuse_no_answers(f"{name}: {path!r}", len(rows), num_empty, max_seqlen)
    if num_empty:
        cause = f"their prompts fill max_seqlen={max_seqlen}"
        _log.warning("%s: %d of %d rows have no token to learn: %s", name, num_empty, len(rows), cause)
    return PromptAnswerDataset(
        ids=tuple(row["id"] for row in rows),
        tokens=np.concatenate(tokens),
        offsets=np.cumsum([0, *map(len, tokens)], dtype=np.int64),
        target_spans=np.array(spans, np.int32),
    )


def tokenize_answers(
    prompts: Sequence[str],
    answers: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_seqlen: int,
    is_rendered: bool = False,
) -> Iterator[tuple[np.ndarray, int]]:
    """Tokens int32 [L] of each prompt+answer+EOS, L <= max_seqlen, and the index of the first answer token.

    The text is tokenised whole; a token that ends after the prompt's last character belongs to the answer. A BOS that
    the tokenizer adds belongs to the prompt; `is_rendered` prompts have their own. The index is L where nothing of the
    answer is left. Raises ValueError for a tokenizer without EOS.
    """
    eos = eos_id(tokenizer)
    if max_seqlen < 1:
        raise ValueError(f"dataset.max_seqlen: found {max_seqlen}; needed at least 1")
    for first in range(0, len(prompts), _ROWS_PER_CALL):
        part = slice(first, first + _ROWS_PER_CALL)
        texts = [prompt + answer for prompt, answer in zip(prompts[part], answers[part], strict=True)]
        encoded = encode(texts, tokenizer, is_rendered=is_rendered, with_offsets=True)
        if encoded.offsets is not None:
            starts = _starts_by_offsets(encoded, prompts[part])
        else:
            starts = _starts_by_prompts(encoded, encode(prompts[part], tokenizer, is_rendered=is_rendered))
        for ids, start in zip(encoded.tokens, starts, strict=True):
            # An answer may end with it by itself: one is enough.
            ids = ids if ids and ids[-1] == eos else [*ids, eos]
            tokens = np.array(ids[:max_seqlen], np.int32)
            yield tokens, min(start, len(ids) - 1, len(tokens))


def _starts_by_offsets(encoded: Encoded, prompts: Sequence[str]) -> Iterator[int]:
    for offsets, prompt in zip(encoded.offsets or (), prompts, strict=True):
        yield next((i for i, (_, end) in enumerate(offsets) if end > len(prompt)), len(offsets))


def _starts_by_prompts(encoded: Encoded, of_prompts: Encoded) -> Iterator[int]:
    # Without offsets, the prompt is what its own tokens and the whole text's have in common.
    for ids, prompt_ids in zip(encoded.tokens, of_prompts.tokens, strict=True):
        pairs = enumerate(zip(ids, prompt_ids, strict=False))
        yield next((i for i, (a, b) in pairs if a != b), min(len(ids), len(prompt_ids)))
