"""Prompts to be answered: tokenised, with the data's own rows kept for what reads the answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from realjax.core.json_text import JsonObject
from realjax.data.cache import load_store
from realjax.data.chat import Messages, Template, prompt_texts, read_messages, shorten
from realjax.data.datasets import FlatDataset, find_ids, offsets_of_lengths
from realjax.data.files import Source
from realjax.data.intake import Intake
from realjax.data.jsonl import CheckFn
from realjax.data.packing import MOST_TOKENS
from realjax.data.store import JsonLines, Writer
from realjax.data.tokens import RepeatCount, encode, eos_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptDataset(FlatDataset):
    """Prompts, with the rows that they were made of, all their keys among them."""

    rows: Sequence[JsonObject]

    def example(self, index: int) -> dict[str, np.ndarray]:
        """`tokens` int32 [L], and `prompt_id` int32, 0-d: the prompt's index."""
        return {"tokens": self.take_tokens(index), "prompt_id": np.array(index, np.int32)}


@dataclass(frozen=True, kw_only=True)
class PromptForm:
    """How prompts become at most `max_len` tokens; they never lose their end, where the answer begins.

    Longer ones lose their beginning (BOS aside), are dropped or refused, as `truncate` says. With `use_chat_template` a
    prompt is a string, which is the user's, or a list of messages with `role` and `content`; the template opens the
    assistant's turn, and where it is too long its longest message loses its beginning. None uses it where prompts are
    messages. `pad_to_max_length` (benchmarks) puts EOS tokens in front of shorter prompts.
    """

    max_len: int
    use_chat_template: bool | None = None
    truncate: Literal["left", "drop", "error"] = "left"
    pad_to_max_length: bool = False


def load_prompts(
    source: Source, tokenizer: "PreTrainedTokenizerBase", form: PromptForm, *, check_fn: CheckFn | None = None
) -> PromptDataset:
    """Dataset of the source's prompts, see `FORMATS`, in their `form`; the log counts those that were cut.

    `check_fn(row, place)` may raise for a row. Raises ValueError for bad data (see `read_rows`), an empty prompt, a
    tokenizer without EOS, or one without the chat template asked for.
    """
    eos_id(tokenizer)
    checked = _Checked(check_fn)
    build = _Build(source=source, tokenizer=tokenizer, form=form, check_fn=checked)
    store = load_store(source, tokenizer, ("prompts", form), build)
    lines = store.lines("rows")
    rows = JsonLines(text=lines.text, ends=lines.ends, numbers_ids=bool(store.facts["is_numbered"]))
    if not checked.has_run:  # the rows came from the cache, but what scores them may be another function
        for number, row in enumerate(rows, start=1):
            checked(row, f"{source.subject} row {number}")
    return PromptDataset(
        ids=find_ids(store),
        rows=rows,
        tokens=store.arrays["tokens"],
        offsets=offsets_of_lengths(store.arrays["lengths"]),
        known_fingerprint=store.digest,
    )


@dataclass
class _Checked:
    """A check of rows that remembers whether it was made; without a function there is nothing to make."""

    check_fn: CheckFn | None
    has_run: bool = False

    def __post_init__(self) -> None:
        self.has_run = self.check_fn is None

    def __call__(self, row: JsonObject, place: str) -> None:
        self.has_run = True
        if self.check_fn is not None:
            self.check_fn(row, place)


@dataclass(kw_only=True)
class _Build:
    """Writes the prompts of a source, and counts what there is to say of them."""

    source: Source
    tokenizer: "PreTrainedTokenizerBase"
    form: PromptForm
    check_fn: CheckFn
    num_rows: int = 0
    num_kept: int = 0
    num_long: int = 0
    is_rendered: bool = False
    repeats: RepeatCount = field(init=False)

    def __call__(self, writer: Writer) -> JsonObject:
        form, source = self.form, self.source
        self.repeats = RepeatCount(tokenizer=self.tokenizer)
        intake = Intake(
            task="prompts",
            source=source,
            tokenizer=self.tokenizer,
            use_chat_template=form.use_chat_template,
            check_fn=self._check,
        )
        for part in intake.parts():
            self.is_rendered = intake.template is not None
            self._write(part, intake.template, writer)
        if form.pad_to_max_length and self.num_kept * form.max_len > MOST_TOKENS:
            raise ValueError(
                f"dataset.pad_to_max_length: {self.num_kept} rows of max_prompt_len={form.max_len} tokens are more "
                f"than {MOST_TOKENS}; lower dataset.max_prompt_len, or set it to False"
            )
        if not self.num_kept:
            raise ValueError(
                f"{source.subject}: every prompt of {self.num_rows} has more tokens than dataset.max_prompt_len="
                f"{form.max_len}, and dataset.truncate=drop; raise it, or set truncate=left"
            )
        return {"is_numbered": intake.is_numbered, "num_rows": self.num_kept, "notes": self._notes()}

    def _check(self, row: JsonObject, place: str) -> None:
        if not row["prompt"]:
            raise ValueError(f"{place}: 'prompt' is empty; write one, or remove the row")
        self.check_fn(row, place)

    def _write(self, rows: list[JsonObject], template: Template | None, writer: Writer) -> None:
        texts = prompt_texts(rows, template)
        if template is None:
            self.repeats.add_starts(texts)
        kept: list[tuple[int, list[int]]] = []
        for i, ids in enumerate(encode(texts, self.tokenizer, is_rendered=template is not None)):
            if not ids:
                row_id = rows[i].get("id", self.num_rows + i)
                raise ValueError(
                    f"{self.source.subject}: the prompt with id {row_id!r} has no tokens; remove it or write one"
                )
            fitting = ids if len(ids) <= self.form.max_len else self._fit(rows[i], ids, template)
            self.num_long += fitting is not ids
            if fitting is not None:
                kept.append((i, fitting))
        self._write_kept(rows, kept, writer)
        self.num_rows += len(rows)

    def _write_kept(self, rows: list[JsonObject], kept: list[tuple[int, list[int]]], writer: Writer) -> None:
        if not kept:
            return
        eos, most = eos_id(self.tokenizer), self.form.max_len
        tokens = [ids for _, ids in kept]
        if self.form.pad_to_max_length:
            tokens = [[eos] * (most - len(ids)) + ids for ids in tokens]
        self.num_kept += len(kept)
        writer.append("tokens", np.concatenate([np.array(ids, np.int32) for ids in tokens]))
        writer.append("lengths", np.array([len(ids) for ids in tokens], np.int32))
        writer.append("numbers", np.array([self.num_rows + i for i, _ in kept], np.int64))
        writer.append_lines("ids", [rows[i].get("id") for i, _ in kept])
        writer.append_lines("rows", [rows[i] for i, _ in kept])

    def _fit(self, row: JsonObject, ids: list[int], template: Template | None) -> list[int] | None:
        """Returns the tokens of a prompt that is too long, as many as fit; None where it is left out."""
        most, truncate = self.form.max_len, self.form.truncate
        if truncate == "error":
            raise ValueError(
                f"{self.source.subject}: the prompt with id {row.get('id')!r} has {len(ids)} tokens, more than "
                f"dataset.max_prompt_len={most}, and dataset.truncate=error; raise it, shorten the prompt, or set "
                "truncate to left or drop"
            )
        if truncate == "drop":
            return None
        if template is not None:
            return _cut_messages(row, template, most)
        front = 1 if most > 1 and ids[0] == self.tokenizer.bos_token_id else 0
        return [*ids[:front], *ids[len(ids) - most + front :]]

    def _notes(self) -> list[str]:
        notes, form = self.repeats.notes(), self.form
        if self.num_long:
            cut = "lose the beginning of their longest message" if self.is_rendered else "lose their beginning"
            fate = "are left out" if form.truncate == "drop" else cut
            notes.append(
                f"{self.num_long} of {self.num_rows} prompts have more tokens than "
                f"max_prompt_len={form.max_len} and {fate}"
            )
        return notes


def _cut_messages(row: JsonObject, template: Template, max_prompt_len: int) -> list[int]:
    """Returns the tokens of a prompt whose messages were cut until it fits: what the template writes stays whole."""

    def tokenise(messages: Messages) -> list[int]:
        text = template.render(messages, row.get("id"))
        return encode([text], template.tokenizer, is_rendered=True)[0]

    messages = shorten(read_messages(row), lambda messages: len(tokenise(messages)) <= max_prompt_len)
    if messages is None:
        raise ValueError(
            f"dataset.max_prompt_len: found {max_prompt_len}, but the chat template alone takes more tokens for the "
            f"prompt with id {row.get('id')!r}; raise it"
        )
    return tokenise(messages)
