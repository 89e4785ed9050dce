"""Answers that are each labelled as desirable or not, for KTO."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from realjax.core.identity import digest
from realjax.data.chat import check_messages, prompt_kinds, prompt_texts
from realjax.data.datasets import order_examples, refuse_no_answers, tokenize_answers
from realjax.data.jsonl import load_rows
from realjax.data.packing import PART_LENS
from realjax.data.tokens import tell_repeats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledDataset:
    """N answers; an example is two sequences, a prompt with its answer and the same prompt with another's answer."""

    ids: tuple[str | int, ...]
    sequences: tuple[tuple[np.ndarray, np.ndarray], ...]  # tokens int32 of both
    answer_starts: np.ndarray  # int32 [N, 2]
    desirable: np.ndarray  # bool [N]

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def fingerprint(self) -> str:
        """A text that changes with the ids, tokens, answers' places or labels."""
        tokens = [part for both in self.sequences for part in both]
        sizes = np.array([len(part) for part in tokens], np.int32)
        return digest(repr(self.ids), np.concatenate(tokens), sizes, self.answer_starts, self.desirable)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of both sequences of each example, int32 [N]."""
        return np.array([len(own) + len(other) for own, other in self.sequences], np.int32)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(tokens) for both in self.sequences for tokens in both)

    def order(self, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
        """Indices of the examples in the order of an epoch."""
        return order_examples(len(self), seed, epoch, shuffle)

    def example(self, index: int) -> dict[str, np.ndarray]:
        """`tokens` and `loss_mask` (True at answer tokens and EOS) of both sequences; 0-d `desirable`, 1 or 0, and
        `pair_weight`, always 1.
        """
        both = self.sequences[index]
        masks = [np.arange(len(t)) >= max(start, 1) for t, start in zip(both, self.answer_starts[index], strict=True)]
        return {
            "tokens": np.concatenate(both),
            "loss_mask": np.concatenate(masks),
            "pair_weight": np.ones((), np.float32),
            "desirable": np.array(self.desirable[index], np.float32),
            PART_LENS: np.array([len(tokens) for tokens in both]),
        }


def load_labelled(
    path: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_seqlen: int,
    use_chat_template: bool = False,
    name: str = "dataset.train_path",
) -> LabelledDataset:
    """Dataset of rows with `prompt`, `answer` and `label`, true where the answer is desirable.

    Each sequence is prompt+answer+EOS, cut on the right to `max_seqlen` tokens. The other answer is that of the next
    row with another prompt. With `use_chat_template` prompts are put into the template, as `load_prompts` does. Raises
    ValueError for a bad file or row, a tokenizer without EOS, or when no row keeps a token of its answer.
    """
    kinds = {"prompt": prompt_kinds(tokenizer, use_chat_template), "answer": str, "label": bool}
    rows = load_rows(path, kinds, name, check_messages)
    prompts = prompt_texts(rows, tokenizer, use_chat_template=use_chat_template, subject=f"{name}: {path!r}")
    answers = [row["answer"] for row in rows]
    tell_repeats([] if use_chat_template else prompts, answers, tokenizer, name)
    others = [answers[i] for i in find_others(prompts)]
    if len(set(prompts)) == 1:
        _log.warning("%s: all %d rows have one prompt, so the KL is estimated from answers to it", name, len(rows))
    own, other = (
        list(tokenize_answers(prompts, part, tokenizer, max_seqlen=max_seqlen, is_rendered=use_chat_template))
        for part in (answers, others)
    )
    num_empty = sum(max(start, 1) >= len(tokens) for tokens, start in own)
    refuse_no_answers(f"{name}: {path!r}", len(rows), num_empty, max_seqlen)
    if num_empty:
        _log.warning("%s: %d of %d rows keep no answer within %d tokens", name, num_empty, len(rows), max_seqlen)
    return LabelledDataset(
        ids=tuple(row["id"] for row in rows),
        sequences=tuple((a, b) for (a, _), (b, _) in zip(own, other, strict=True)),
        answer_starts=np.array([(a, b) for (_, a), (_, b) in zip(own, other, strict=True)], np.int32),
        desirable=np.array([row["label"] for row in rows]),
    )


def find_others(prompts: Sequence[str]) -> np.ndarray:
    """Returns for each prompt the index of the next one, round the end, that is another; where all are equal, of the
    next one.
    """
    num, found = len(prompts), np.zeros(len(prompts), np.int64)
    other = None
    for i in reversed(range(2 * num)):  # twice round, so that the last ones find the first
        if prompts[i % num] != prompts[(i + 1) % num]:
            other = (i + 1) % num
        found[i % num] = (i + 1) % num if other is None else other
    return found
