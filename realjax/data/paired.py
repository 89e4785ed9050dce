"""Pairs of a better and a worse answer to a prompt, for reward modelling and DPO."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from realjax.core.identity import digest
from realjax.core.json_text import JsonObject
from realjax.data.chat import check_messages, prompt_kinds, prompt_texts
from realjax.data.datasets import tokenize_answers
from realjax.data.jsonl import load_rows
from realjax.data.tokens import tell_repeats
from realjax.data.twos import TwoSequences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class PairedDataset(TwoSequences):
    """N pairs; a pair is one example of two sequences, the better answer first.

    `groups[p]` are the pairs of prompt p, of which an epoch draws `max_pairs` at most.
    """

    prompts: np.ndarray  # int32 [N]: the prompt of each pair
    groups: tuple[tuple[int, ...], ...]
    max_pairs: int

    @property
    def fingerprint(self) -> str:
        # Also the number of pairs drawn.
        return digest(super().fingerprint, self.prompts, str(self.max_pairs))

    def order(self, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
        """Indices of an epoch's pairs: of each prompt `max_pairs` at most, drawn anew each epoch and kept together.

        Without shuffling the prompts keep their order and the draw is that of epoch 0.
        """
        rng = np.random.default_rng((seed, epoch if shuffle else 0))
        prompts = rng.permutation(len(self.groups)) if shuffle else np.arange(len(self.groups))
        drawn = [rng.permutation(self.groups[prompt])[: self.max_pairs] for prompt in prompts]
        return np.concatenate(drawn)

    def example(self, index: int) -> dict[str, np.ndarray]:
        """`tokens` and `loss_mask` (True at answer tokens and EOS) of both sequences, and 0-d `pair_weight`.

        The weights of a prompt's pairs in an epoch add up to 1.
        """
        size = min(self.max_pairs, len(self.groups[self.prompts[index]]))
        return self.take_both(index) | {"pair_weight": np.array(1 / size, np.float32)}


def load_paired(
    path: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_seqlen: int,
    max_pairs_per_prompt: int,
    use_chat_template: bool = False,
    name: str = "dataset.train_path",
) -> PairedDataset:
    """Dataset of rows with `prompt`, `pos_answers` and `neg_answers`, lists of equal length; pair i is their i-th
    entries.

    Each sequence is prompt+answer+EOS, cut on the right to `max_seqlen` tokens. With `use_chat_template` prompts are
    put into the template, as `load_prompts` does. Raises ValueError for a bad file or row, a tokenizer without EOS, or
    when no pair is left with two different sequences.
    """
    kinds = {"prompt": prompt_kinds(tokenizer, use_chat_template), "pos_answers": list, "neg_answers": list}
    rows = load_rows(path, kinds, name, _check_row)
    sizes = [len(row["pos_answers"]) for row in rows]
    texts = prompt_texts(rows, tokenizer, use_chat_template=use_chat_template, subject=f"{name}: {path!r}")
    prompts = [text for text, size in zip(texts, sizes, strict=True) for _ in range(size)]
    answers = [[answer for row in rows for answer in row[key]] for key in ("pos_answers", "neg_answers")]
    tell_repeats([] if use_chat_template else texts, [*answers[0], *answers[1]], tokenizer, name)
    better, worse = (
        list(tokenize_answers(prompts, part, tokenizer, max_seqlen=max_seqlen, is_rendered=use_chat_template))
        for part in answers
    )
    num_equal = sum(np.array_equal(b, w) for (b, _), (w, _) in zip(better, worse, strict=True))
    if num_equal == len(prompts):
        raise ValueError(
            f"{name}: {path!r}: no pair of {len(prompts)} has answers that differ within dataset.max_seqlen="
            f"{max_seqlen}, so there is nothing to learn; raise dataset.max_seqlen or shorten the prompts"
        )
    if num_equal:
        _log.warning(
            "%s: %d of %d pairs have equal answers within %d tokens", name, num_equal, len(prompts), max_seqlen
        )
    ends = np.cumsum(sizes)
    return PairedDataset(
        ids=tuple(f"{row['id']}-{i}" for row in rows for i in range(len(row["pos_answers"]))),
        sequences=tuple((b, w) for (b, _), (w, _) in zip(better, worse, strict=True)),
        answer_starts=np.array([(b, w) for (_, b), (_, w) in zip(better, worse, strict=True)], np.int32),
        prompts=np.repeat(np.arange(len(rows), dtype=np.int32), sizes),
        groups=tuple(tuple(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)),
        max_pairs=max_pairs_per_prompt,
    )


def _check_row(row: JsonObject, subject: str) -> None:
    check_messages(row, subject)
    better, worse = row["pos_answers"], row["neg_answers"]
    if len(better) != len(worse) or not better:
        raise ValueError(
            f"{subject}: found {len(better)} pos_answers and {len(worse)} neg_answers; it needs as many of each, at "
            "least one, since they are compared one by one"
        )
    answers: Sequence[object] = [*better, *worse]
    if not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"{subject}: an answer is no string; pos_answers and neg_answers are lists of strings")
