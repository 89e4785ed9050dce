"""Prompts to be answered: tokenised, with their texts and the data's own rows kept for what reads the answers."""

import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from realjax.core.identity import digest
from realjax.core.json_text import JsonObject
from realjax.data.chat import Messages, check_messages, prompt_kinds, prompt_texts, read_messages, render, shorten
from realjax.data.datasets import FlatDataset
from realjax.data.jsonl import CheckFn, load_rows
from realjax.data.packing import MOST_TOKENS
from realjax.data.tokens import encode, eos_id, tell_repeats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptDataset(FlatDataset):
    """Prompts, with what they were made of."""

    rows: tuple[JsonObject, ...]  # as in the file, with all their keys
    texts: tuple[str, ...]  # what was tokenised, uncut

    @property
    def fingerprint(self) -> str:
        # Rewards may read any key of a row.
        return digest(super().fingerprint, json.dumps(self.rows), json.dumps(self.texts))

    def example(self, index: int) -> dict[str, np.ndarray]:
        """`tokens` int32 [L], and `prompt_id` int32, 0-d: the prompt's index."""
        return {"tokens": self.take_tokens(index), "prompt_id": np.array(index, np.int32)}


@dataclass(frozen=True, kw_only=True)
class PromptForm:
    """How prompts become tokens: cut on the right to `max_len` of them, as ReaL does.

    With `use_chat_template` a prompt is a string, which is the user's, or a list of messages with `role` and `content`;
    the template opens the assistant's turn, and where it is too long its longest message is cut. `pad_to_max_length`
    (benchmarks) puts EOS tokens in front of shorter prompts.
    """

    max_len: int
    use_chat_template: bool = False
    pad_to_max_length: bool = False


def load_prompts(
    path: str,
    tokenizer: "PreTrainedTokenizerBase",
    form: PromptForm,
    *,
    max_prompts: int | None = None,
    check_fn: CheckFn | None = None,
    name: str = "dataset.path",
) -> PromptDataset:
    """Dataset of the file's `prompt` in its `form`; the log counts those that were cut.

    `max_prompts` keeps the file's first ones, and `check_fn(row, place)` may raise for a row. Raises ValueError for a
    bad file (see `load_rows`), an empty prompt, a tokenizer without EOS, or one without the chat template asked for.
    """
    max_prompt_len, use_chat_template = form.max_len, form.use_chat_template
    eos = eos_id(tokenizer)
    kinds = {"prompt": prompt_kinds(tokenizer, use_chat_template)}

    def check(row: JsonObject, place: str) -> None:
        _check_prompt(row, place)
        if check_fn is not None:
            check_fn(row, place)

    rows, subject = load_rows(path, kinds, name, check)[:max_prompts], f"{name}: {path!r}"
    if form.pad_to_max_length and len(rows) * max_prompt_len > MOST_TOKENS:
        raise ValueError(
            f"dataset.pad_to_max_length: {len(rows)} rows of max_prompt_len={max_prompt_len} tokens are more than "
            f"{MOST_TOKENS}; lower dataset.max_prompt_len, or set it to False"
        )
    texts = prompt_texts(rows, tokenizer, use_chat_template=use_chat_template, subject=subject)
    tell_repeats([] if use_chat_template else texts, (), tokenizer, name)
    tokens = encode(texts, tokenizer, is_rendered=use_chat_template).tokens
    if empty := [row["id"] for row, ids in zip(rows, tokens, strict=True) if not ids]:
        raise ValueError(f"{subject}: the prompt with id {empty[0]!r} has no tokens; remove it or write one")
    long = [i for i, ids in enumerate(tokens) if len(ids) > max_prompt_len]
    for i in long:
        cut = _cut_messages(rows[i], tokenizer, max_prompt_len, subject) if use_chat_template else tokens[i]
        tokens[i] = cut[:max_prompt_len]
    if long:
        loss = "cut their longest message" if use_chat_template else "lose those at their end"
        line = "%s: %d of %d prompts have more tokens than max_prompt_len=%d and " + loss
        _log.warning(line, name, len(long), len(rows), max_prompt_len)
    if form.pad_to_max_length:
        tokens = [[eos] * (max_prompt_len - len(ids)) + ids for ids in tokens]
    return PromptDataset(
        ids=tuple(row["id"] for row in rows),
        rows=tuple(rows),
        texts=tuple(texts),
        tokens=np.concatenate([np.array(ids, np.int32) for ids in tokens]),
        offsets=np.cumsum([0, *map(len, tokens)], dtype=np.int64),
    )


def _check_prompt(row: JsonObject, subject: str) -> None:
    if not row["prompt"]:
        raise ValueError(f"{subject}: 'prompt' is empty; write one, or remove the row")
    check_messages(row, subject)


def _cut_messages(
    row: JsonObject, tokenizer: "PreTrainedTokenizerBase", max_prompt_len: int, subject: str
) -> list[int]:
    """Returns the tokens of a prompt whose messages were cut until it fits: what the template writes stays whole."""

    def tokenise(messages: Messages) -> list[int]:
        text = render(messages, row["id"], tokenizer, subject)
        return encode([text], tokenizer, is_rendered=True).tokens[0]

    messages = shorten(read_messages(row), lambda messages: len(tokenise(messages)) <= max_prompt_len)
    if messages is None:
        raise ValueError(
            f"dataset.max_prompt_len: found {max_prompt_len}, but the chat template alone takes more tokens for the "
            f"prompt with id {row['id']!r}; raise it"
        )
    return tokenise(messages)
