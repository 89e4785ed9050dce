"""Answers that are each labelled as desirable or not, for KTO."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from realjax.core.identity import digest
from realjax.core.json_text import JsonObject
from realjax.data.cache import load_store
from realjax.data.chat import prompt_texts
from realjax.data.datasets import find_ids, offsets_of_lengths, order_examples
from realjax.data.files import Source
from realjax.data.intake import Intake
from realjax.data.paired import check_answers, make_passage
from realjax.data.sequences import SequenceForm, TokenSequence, make_sequences, refuse_long, refuse_no_answers
from realjax.data.store import Writer
from realjax.data.tokens import RepeatCount, eos_id
from realjax.data.twos import TwoSequences, write_answers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledDataset(TwoSequences):
    """N answers; an example is two sequences, a prompt with its answer and the same prompt with another's answer."""

    desirable: np.ndarray  # bool [N]

    @property
    def fingerprint(self) -> str:
        return self.known_fingerprint or digest(super().fingerprint, self.desirable)

    def order(self, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
        """Indices of the examples in the order of an epoch."""
        return order_examples(len(self), seed, epoch, shuffle)

    def example(self, index: int) -> dict[str, np.ndarray]:
        """`tokens` and `loss_mask` (True at answer tokens and EOS) of both sequences; of each `desirable`, 1 or 0, and
        `is_other`, whether the answer is another prompt's.
        """
        desirable = np.array([self.desirable[index], False], np.float32)
        return self.take_both(index) | {"desirable": desirable, "is_other": np.array([False, True])}


def load_labelled(source: Source, tokenizer: "PreTrainedTokenizerBase", form: SequenceForm) -> LabelledDataset:
    """Dataset of the source's answers with a `label`, see `FORMATS`, true where the answer is desirable.

    The other answer of an example is that of the next row with another prompt. Raises ValueError for bad data (see
    `read_rows`), a tokenizer without EOS, or when no row keeps a token of its answer.
    """
    eos_id(tokenizer)
    store = load_store(source, tokenizer, ("labels", form), _Build(source=source, tokenizer=tokenizer, form=form))
    return LabelledDataset(
        ids=find_ids(store),
        tokens=store.arrays["tokens"],
        offsets=offsets_of_lengths(store.arrays["lengths"]),
        answer_starts=store.arrays["answer_starts"].reshape(-1, 2),
        desirable=store.arrays["desirable"],
        known_fingerprint=store.digest,
    )


@dataclass(kw_only=True)
class _Build:
    """Writes the labelled answers of a source. All rows are in memory meanwhile, as any may be another's neighbour."""

    source: Source
    tokenizer: "PreTrainedTokenizerBase"
    form: SequenceForm

    def __call__(self, writer: Writer) -> JsonObject:
        form, source = self.form, self.source
        intake = Intake(
            task="labels",
            source=source,
            tokenizer=self.tokenizer,
            use_chat_template=form.use_chat_template,
            check_fn=_check_row,
        )
        rows = [row for part in intake.parts() for row in part]
        prompts = prompt_texts(rows, intake.template)
        others = find_others(prompts)
        own, other = (
            make_sequences(
                [make_passage(rows[i], prompts[i], rows[j]["answer"], intake.template) for i, j in enumerate(places)],
                self.tokenizer,
                max_seqlen=form.max_seqlen,
                cuts_left=form.truncate == "left",
            )
            for places in (range(len(rows)), others.tolist())
        )
        pairs = list(zip(own, other, strict=True))
        kept = [i for i, (sequence, _) in enumerate(pairs) if self._keeps(rows[i], sequence)]
        num_empty = sum(not pairs[i][0].loss_mask.any() for i in kept)
        refuse_no_answers(source.subject, len(kept), num_empty, form.max_seqlen)
        both = [sequence for i in kept for sequence in pairs[i]]
        write_answers(both, writer)
        writer.append("desirable", np.array([rows[i]["label"] for i in kept], np.bool_))
        writer.append("numbers", np.array(kept, np.int64))
        writer.append_lines("ids", [rows[i].get("id") for i in kept])
        notes = self._notes(rows, prompts, is_rendered=intake.template is not None)
        most = form.max_seqlen
        if num_empty:
            notes.append(f"{num_empty} of {len(kept)} rows keep no answer within {most} tokens")
        if num_left := len(rows) - len(kept):
            notes.append(f"{num_left} of {len(rows)} rows have more tokens than max_seqlen={most}, left out")
        return {"is_numbered": intake.is_numbered, "num_rows": len(kept), "notes": notes}

    def _keeps(self, row: JsonObject, sequence: TokenSequence) -> bool:
        if sequence.is_cut and self.form.truncate == "error":
            refuse_long(self.source.subject, row.get("id"), sequence.whole_len, self.form.max_seqlen)
        return not (sequence.is_cut and self.form.truncate == "drop")

    def _notes(self, rows: list[JsonObject], prompts: list[str], *, is_rendered: bool) -> list[str]:
        repeats = RepeatCount(tokenizer=self.tokenizer)
        if not is_rendered:
            repeats.add_starts(prompts)
        repeats.add_ends([row["answer"] for row in rows if isinstance(row["answer"], str)])
        if len(set(prompts)) > 1:
            return repeats.notes()
        told = f"all {len(rows)} rows have one prompt, so the KL is estimated from answers to it"
        return [*repeats.notes(), told]


def _check_row(row: JsonObject, subject: str) -> None:
    if isinstance(row["answer"], list):
        check_answers([row["answer"]], subject)


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
