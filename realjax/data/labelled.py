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
from realjax.data.tokens import tell_repeats
from realjax.data.twos import TwoSequences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledDataset(TwoSequences):
    """N answers; an example is two sequences, a prompt with its answer and the same prompt with another's answer."""

    desirable: np.ndarray  # bool [N]

    @property
    def fingerprint(self) -> str:
        return digest(super().fingerprint, self.desirable)

    def order(self, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
        """Indices of the examples in the order of an epoch."""
        return order_examples(len(self), seed, epoch, shuffle)

    def example(self, index: int) -> dict[str, np.ndarray]:
        """`tokens` and `loss_mask` (True at answer tokens and EOS) of both sequences; of each `desirable`, 1 or 0, and
        `is_other`, whether the answer is another prompt's.
        """
        desirable = np.array([self.desirable[index], False], np.float32)
        return self.take_both(index) | {"desirable": desirable, "is_other": np.array([False, True])}


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
