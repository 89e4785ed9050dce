"""Pairs of a better and a worse answer to a prompt, for reward modelling and DPO."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from realjax.core.identity import digest
from realjax.core.json_text import JsonObject
from realjax.data.cache import load_store
from realjax.data.chat import Messages, Passage, Template, prompt_texts, read_messages
from realjax.data.datasets import Ids, join_answer, offsets_of_lengths
from realjax.data.files import Source
from realjax.data.intake import Intake
from realjax.data.sequences import SequenceForm, TokenSequence, make_sequences, refuse_long
from realjax.data.store import Made, Writer
from realjax.data.tokens import RepeatCount, eos_id
from realjax.data.twos import TwoSequences, write_answers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, eq=False)
class PairedDataset(TwoSequences):
    """N pairs; a pair is one example of two sequences, the better answer first.

    The pairs of prompt p are `groups[p]` to `groups[p+1]`, of which an epoch draws `max_pairs` at most.
    """

    groups: np.ndarray  # int64 [P+1]
    max_pairs: int

    @property
    def fingerprint(self) -> str:
        # Also the number of pairs drawn.
        return digest(super().fingerprint, self.groups, str(self.max_pairs))

    @property
    def prompts(self) -> np.ndarray:
        """The prompt of each pair, int32 [N]."""
        return np.repeat(np.arange(len(self.groups) - 1, dtype=np.int32), np.diff(self.groups))

    def order(self, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
        """Indices of an epoch's pairs: of each prompt `max_pairs` at most, drawn anew each epoch and kept together.

        Without shuffling the prompts keep their order and the draw is that of epoch 0.
        """
        rng = np.random.default_rng((seed, epoch if shuffle else 0))
        num_prompts, sizes = len(self.groups) - 1, np.diff(self.groups)
        prompts = rng.permutation(num_prompts) if shuffle else np.arange(num_prompts)
        if (sizes == 1).all():
            return self.groups[prompts]
        drawn = [
            rng.permutation(np.arange(self.groups[prompt], self.groups[prompt + 1]))[: self.max_pairs]
            for prompt in prompts
        ]
        return np.concatenate(drawn)

    def example(self, index: int) -> dict[str, np.ndarray]:
        """`tokens` and `loss_mask` (True at answer tokens and EOS) of both sequences, and 0-d `pair_weight`.

        The weights of a prompt's pairs in an epoch add up to 1.
        """
        prompt = int(np.searchsorted(self.groups, index, side="right")) - 1
        size = min(self.max_pairs, int(self.groups[prompt + 1] - self.groups[prompt]))
        return self.take_both(index) | {"pair_weight": np.array(1 / size, np.float32)}


@dataclass(frozen=True, eq=False)
class PairIds(Made[str]):
    """Ids of pairs: the row's id and the pair's number in the row."""

    rows: Ids
    groups: np.ndarray

    def __len__(self) -> int:
        return int(self.groups[-1])

    def make(self, place: int) -> str:
        row = int(np.searchsorted(self.groups, place, side="right")) - 1
        return f"{self.rows[row]}-{place - int(self.groups[row])}"


def load_paired(
    source: Source, tokenizer: "PreTrainedTokenizerBase", form: SequenceForm, *, max_pairs_per_prompt: int
) -> PairedDataset:
    """Dataset of the source's pairs of answers, see `FORMATS`, in their `form`; pair i of a row is its i-th entries.

    Raises ValueError for bad data (see `read_rows`), a tokenizer without EOS, or when no pair is left with two
    different sequences.
    """
    eos_id(tokenizer)
    store = load_store(source, tokenizer, ("pairs", form), _Build(source=source, tokenizer=tokenizer, form=form))
    groups = offsets_of_lengths(store.arrays["sizes"])
    rows: Ids = range(len(groups) - 1) if store.facts["is_numbered"] else store.lines("ids")
    return PairedDataset(
        ids=PairIds(rows, groups),
        tokens=store.arrays["tokens"],
        offsets=offsets_of_lengths(store.arrays["lengths"]),
        answer_starts=store.arrays["answer_starts"].reshape(-1, 2),
        groups=groups,
        max_pairs=max_pairs_per_prompt,
        known_fingerprint=store.digest,
    )


@dataclass(kw_only=True)
class _Build:
    """Writes the pairs of a source, and counts what there is to say of them."""

    source: Source
    tokenizer: "PreTrainedTokenizerBase"
    form: SequenceForm
    num_pairs: int = 0
    num_equal: int = 0
    num_cut: int = 0
    repeats: RepeatCount = field(init=False)

    def __call__(self, writer: Writer) -> JsonObject:
        form, source = self.form, self.source
        self.repeats = RepeatCount(tokenizer=self.tokenizer)
        intake = Intake(
            task="pairs",
            source=source,
            tokenizer=self.tokenizer,
            use_chat_template=form.use_chat_template,
            check_fn=_check_row,
        )
        num_rows = 0
        for part in intake.parts():
            self._write(part, intake.template, writer)
            num_rows += len(part)
        if self.num_equal == self.num_pairs:
            raise ValueError(
                f"{source.subject}: no pair of {self.num_pairs} has answers that differ within dataset.max_seqlen="
                f"{form.max_seqlen}, so there is nothing to learn; raise dataset.max_seqlen or shorten the prompts"
            )
        return {"is_numbered": intake.is_numbered, "num_rows": num_rows, "notes": self._notes()}

    def _write(self, rows: list[JsonObject], template: Template | None, writer: Writer) -> None:
        texts = prompt_texts(rows, template)
        if template is None:
            self.repeats.add_starts(texts)
        made = [self._make(key, rows, texts, template) for key in ("pos_answers", "neg_answers")]
        pairs = list(zip(*made, strict=True))
        sizes = self._drop_long(rows, pairs) if self.form.truncate in ("drop", "error") else None
        if sizes is None:
            sizes = [len(row["pos_answers"]) for row in rows]
        else:
            pairs = [pair for pair in pairs if not any(one.is_cut for one in pair)]
        self.num_pairs += len(pairs)
        self.num_equal += sum(np.array_equal(better.tokens, worse.tokens) for better, worse in pairs)
        both = [sequence for pair in pairs for sequence in pair]
        kept = [(row, size) for row, size in zip(rows, sizes, strict=True) if size]
        if both:
            write_answers(both, writer)
            writer.append("sizes", np.array([size for _, size in kept], np.int32))
            writer.append_lines("ids", [row.get("id") for row, _ in kept])

    def _make(
        self, key: str, rows: list[JsonObject], texts: list[str], template: Template | None
    ) -> list[TokenSequence]:
        passages = [
            make_passage(row, text, answer, template)
            for row, text in zip(rows, texts, strict=True)
            for answer in row[key]
        ]
        self.repeats.add_ends([answer for row in rows for answer in row[key] if isinstance(answer, str)])
        cuts_left = self.form.truncate == "left"
        made = make_sequences(passages, self.tokenizer, max_seqlen=self.form.max_seqlen, cuts_left=cuts_left)
        return list(made)

    def _drop_long(self, rows: list[JsonObject], pairs: list[tuple[TokenSequence, ...]]) -> list[int]:
        """Returns how many pairs of each row fit; ValueError where none may be left out."""
        sizes, rest = [], iter(pairs)
        for row in rows:
            size = 0
            for _ in row["pos_answers"]:
                longest = max(next(rest), key=lambda one: one.whole_len)
                if longest.is_cut and self.form.truncate == "error":
                    refuse_long(self.source.subject, row.get("id"), longest.whole_len, self.form.max_seqlen)
                self.num_cut += longest.is_cut
                size += not longest.is_cut
            sizes.append(size)
        return sizes

    def _notes(self) -> list[str]:
        notes, most = self.repeats.notes(), self.form.max_seqlen
        if self.num_equal:
            notes.append(f"{self.num_equal} of {self.num_pairs} pairs have equal answers within {most} tokens")
        if self.num_cut:
            notes.append(f"{self.num_cut} pairs have more tokens than max_seqlen={most} and are left out")
        return notes


def make_passage(row: JsonObject, text: str, answer: str | Messages, template: Template | None) -> Passage:
    """Returns a prompt's text with an answer, a text or the messages that follow."""
    if isinstance(answer, str):
        return join_answer(text, answer, is_rendered=template is not None)
    assert template is not None, "messages were let in for it"
    rest = template.render_answer(text, [*read_messages(row), *answer], row.get("id"))
    return join_answer(text, rest, is_rendered=True)


def _check_row(row: JsonObject, subject: str) -> None:
    better, worse = row["pos_answers"], row["neg_answers"]
    if len(better) != len(worse) or not better:
        raise ValueError(
            f"{subject}: found {len(better)} pos_answers and {len(worse)} neg_answers; it needs as many of each, at "
            "least one, since they are compared one by one"
        )
    answers: Sequence[object] = [*better, *worse]
    if all(isinstance(answer, str) for answer in answers):
        return
    if not all(isinstance(answer, list) and isinstance(row["prompt"], list) for answer in answers):
        raise ValueError(f"{subject}: an answer is no string; pos_answers and neg_answers are lists of strings")
    check_answers([answer for answer in answers if isinstance(answer, list)], subject)


def check_answers(answers: Sequence[Messages], subject: str) -> None:
    """Raises ValueError for messages that are no single turn of the assistant."""
    for answer in answers:
        if [message["role"] for message in answer] != ["assistant"]:
            raise ValueError(
                f"{subject}: the two conversations part before their last answer; they are compared by one answer of "
                "the assistant each, after the same messages"
            )
