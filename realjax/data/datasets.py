"""Tokenised examples of one sequence each, which the loader packs: for fine-tuning, and the base of prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, overload

import numpy as np

from realjax.core.identity import digest
from realjax.core.json_text import JsonObject
from realjax.data.cache import load_store
from realjax.data.chat import Passage, Template, prompt_texts
from realjax.data.files import Source
from realjax.data.intake import Intake
from realjax.data.packing import MOST_TOKENS
from realjax.data.sequences import (
    SequenceForm,
    TokenSequence,
    make_sequences,
    refuse_long,
    refuse_no_answers,
)
from realjax.data.store import JsonLines, Store, Writer
from realjax.data.tokens import RepeatCount, eos_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = Sequence[str | int]


def order_examples(num_examples: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """Returns the indices of examples in the order of an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(num_examples) if shuffle else np.arange(num_examples)


@dataclass(frozen=True, eq=False)
class Numbers(Sequence[int]):
    """Ids that are the rows' numbers in their file."""

    values: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        found = self.values[index]
        return found.tolist() if isinstance(index, slice) else int(found)


def find_ids(store: Store) -> Ids:
    """Returns the names of a store's rows: their own, or their numbers where one has none."""
    return Numbers(store.arrays["numbers"]) if store.facts["is_numbered"] else store.lines("ids")


def digest_ids(ids: Ids) -> str:
    """Returns a text that changes with the ids."""
    if isinstance(ids, JsonLines):
        return digest(ids.text, ids.ends)
    return digest(ids.values) if isinstance(ids, Numbers) else digest(repr(tuple(ids)))


def offsets_of_lengths(lengths: np.ndarray) -> np.ndarray:
    """Returns where each of so many tokens begins, and where the last one ends, int64 [N+1]."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


@dataclass(frozen=True, kw_only=True, eq=False)
class FlatDataset:
    """N examples of one sequence each, flat: example i is `tokens[offsets[i]:offsets[i+1]]`."""

    ids: Ids
    tokens: np.ndarray  # int32, all examples one after the other
    offsets: np.ndarray  # int64 [N+1]
    known_fingerprint: str | None = None  # of all that they were made of

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def fingerprint(self) -> str:
        """A text that changes with the ids and tokens."""
        return self.known_fingerprint or digest(digest_ids(self.ids), self.tokens, self.offsets)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int32 [N]."""
        return np.diff(self.offsets).astype(np.int32)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.lengths.max())

    @property
    def num_targets(self) -> np.ndarray | None:
        """None: nothing says which of the tokens are learned."""
        return None

    def order(self, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
        """Indices of the examples in the order of an epoch."""
        return order_examples(len(self), seed, epoch, shuffle)

    def take_tokens(self, index: int) -> np.ndarray:
        """Tokens of one example, int32 [L]."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptAnswerDataset(FlatDataset):
    """Examples for SFT, each learned at some of its tokens."""

    loss_mask: np.ndarray  # bool, flat as the tokens

    @property
    def fingerprint(self) -> str:
        return self.known_fingerprint or digest(super().fingerprint, self.loss_mask)

    @property
    def num_targets(self) -> np.ndarray:
        """Tokens of each example that are learned, int32 [N]."""
        return np.add.reduceat(self.loss_mask, self.offsets[:-1], dtype=np.int32)

    def example(self, index: int) -> dict[str, np.ndarray]:
        """`tokens` int32 [L] and `loss_mask` bool [L], True at what is learned: answers and what ends them."""
        loss_mask = self.loss_mask[self.offsets[index] : self.offsets[index + 1]]
        return {"tokens": self.take_tokens(index), "loss_mask": loss_mask}


def load_prompt_answer(source: Source, tokenizer: "PreTrainedTokenizerBase", form: SequenceForm) -> PromptAnswerDataset:
    """Dataset of the source's answers, conversations or plain texts, see `FORMATS`, in their `form`.

    A prompt's answer is learned with its EOS, of a conversation the assistant's turns, of a text all. Raises ValueError
    for bad data (see `read_rows`), a tokenizer without EOS, or when no row keeps a token to learn.
    """
    eos_id(tokenizer)
    store = load_store(source, tokenizer, ("answers", form), _Build(source=source, tokenizer=tokenizer, form=form))
    return PromptAnswerDataset(
        ids=find_ids(store),
        tokens=store.arrays["tokens"],
        offsets=offsets_of_lengths(store.arrays["lengths"]),
        loss_mask=store.arrays["loss_mask"],
        known_fingerprint=store.digest,
    )


@dataclass(kw_only=True)
class _Build:
    """Writes the sequences of a source, and counts what there is to say of them."""

    source: Source
    tokenizer: "PreTrainedTokenizerBase"
    form: SequenceForm
    num_rows: int = 0
    num_kept: int = 0
    num_empty: int = 0
    num_cut: int = 0
    repeats: RepeatCount = field(init=False)

    def __call__(self, writer: Writer) -> JsonObject:
        form, source = self.form, self.source
        self.repeats = RepeatCount(tokenizer=self.tokenizer)
        intake = Intake(
            task="answers", source=source, tokenizer=self.tokenizer, use_chat_template=form.use_chat_template
        )
        for part in intake.parts():
            self._write(part, intake.template, writer)
        if form.pad_to_max_length and self.num_kept * form.max_seqlen > MOST_TOKENS:
            raise ValueError(
                f"dataset.pad_to_max_length: {self.num_kept} rows of max_seqlen={form.max_seqlen} tokens are more than "
                f"{MOST_TOKENS}; lower dataset.max_seqlen, or set it to False"
            )
        refuse_no_answers(source.subject, self.num_kept, self.num_empty, form.max_seqlen)
        return {"is_numbered": intake.is_numbered, "num_rows": self.num_kept, "notes": self._notes()}

    def _write(self, rows: list[JsonObject], template: Template | None, writer: Writer) -> None:
        form = self.form
        passages = make_passages(rows, template, form)
        if template is None:
            self.repeats.add_starts([passage.text for passage in passages])
        self.repeats.add_ends([row["answer"] for row in rows if "num_given" not in row and "answer" in row])
        made = make_sequences(passages, self.tokenizer, max_seqlen=form.max_seqlen, cuts_left=form.truncate == "left")
        kept: list[tuple[int, JsonObject, TokenSequence]] = []
        for row, sequence in zip(rows, made, strict=True):
            number, self.num_rows = self.num_rows, self.num_rows + 1
            self.num_cut += sequence.is_cut
            if sequence.is_cut and form.truncate == "error":
                refuse_long(self.source.subject, row.get("id", number), sequence.whole_len, form.max_seqlen)
            if not (sequence.is_cut and form.truncate == "drop"):
                kept.append((number, row, sequence))
        self._write_kept(kept, writer)

    def _write_kept(self, kept: Sequence[tuple[int, JsonObject, TokenSequence]], writer: Writer) -> None:
        if not kept:
            return
        eos, sequences = eos_id(self.tokenizer), [sequence for _, _, sequence in kept]
        self.num_kept += len(kept)
        self.num_empty += sum(not sequence.loss_mask.any() for sequence in sequences)
        pads = [self.form.max_seqlen - len(s.tokens) if self.form.pad_to_max_length else 0 for s in sequences]
        tokens = (np.pad(s.tokens, (0, n), constant_values=eos) for s, n in zip(sequences, pads, strict=True))
        masks = (np.pad(s.loss_mask, (0, n)) for s, n in zip(sequences, pads, strict=True))
        writer.append("tokens", np.concatenate([*tokens] if any(pads) else [s.tokens for s in sequences]))
        writer.append("loss_mask", np.concatenate([*masks] if any(pads) else [s.loss_mask for s in sequences]))
        lengths = [len(sequence.tokens) + pad for sequence, pad in zip(sequences, pads, strict=True)]
        writer.append("lengths", np.array(lengths, np.int32))
        writer.append("numbers", np.array([number for number, _, _ in kept], np.int64))
        writer.append_lines("ids", [row.get("id") for _, row, _ in kept])

    def _notes(self) -> list[str]:
        notes, most = self.repeats.notes(), self.form.max_seqlen
        if self.num_empty:
            cause = f"their prompts fill max_seqlen={most}"
            notes.append(f"{self.num_empty} of {self.num_kept} rows have no token to learn: {cause}")
        if self.num_cut > self.num_empty or (self.num_cut and self.form.truncate == "drop"):
            fate = {"right": "lose their end", "left": "lose their beginning", "drop": "are left out"}
            notes.append(
                f"{self.num_cut} of {self.num_rows} rows have more tokens than max_seqlen={most} and "
                f"{fate[self.form.truncate]}"
            )
        return notes


def make_passages(rows: Sequence[JsonObject], template: Template | None, form: SequenceForm) -> list[Passage]:
    """Returns the rows' texts, with what is learned of each: an answer, the assistant's turns, or all of a text."""
    prompts = iter(prompt_texts([row for row in rows if _has_answer(row)], template))
    passages = []
    for row in rows:
        if "num_given" in row:
            assert template is not None, "conversations have one"
            passages.append(template.render_dialogue(row, form.turns))
        elif _has_answer(row):
            passages.append(join_answer(next(prompts), row["answer"], is_rendered=template is not None))
        else:
            passages.append(Passage(text=row["text"], spans=((0, len(row["text"])),)))
    return passages


def _has_answer(row: JsonObject) -> bool:
    return "num_given" not in row and "prompt" in row and "answer" in row


def join_answer(prompt: str, answer: str, *, is_rendered: bool) -> Passage:
    """Returns a prompt with its answer, which is learned."""
    text = prompt + answer
    return Passage(text=text, spans=((len(prompt), len(text)),), is_rendered=is_rendered)
