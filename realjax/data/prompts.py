"""Prompts to be answered: tokenised, with their texts and the data's own rows kept for what reads the answers."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from realjax.data.datasets import FlatDataset, eos_id
from realjax.data.jsonl import load_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptDataset(FlatDataset):
    """Prompts, with what they were made of."""

    rows: tuple[dict[str, Any], ...]  # as in the file, with all their keys
    texts: tuple[str, ...]  # what was tokenised, uncut

    def example(self, index: int) -> dict[str, np.ndarray]:
        """`tokens` int32 [L], and `prompt_id` int32, 0-d: the prompt's index."""
        return {"tokens": self.tokens_of(index), "prompt_id": np.array(index, np.int32)}


def load_prompts(
    path: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_prompt_len: int,
    pad_to_max_length: bool = False,
    use_chat_template: bool = False,
    max_prompts: int | None = None,
    name: str = "dataset.path",
) -> PromptDataset:
    """Dataset of the file's `prompt`, cut on the right to `max_prompt_len` tokens, as ReaL does; the log counts them.

    With `use_chat_template` a prompt is a string, which is the user's, or a list of messages with `role` and `content`;
    the template opens the assistant's turn. `pad_to_max_length` (benchmarks) puts EOS tokens in front of shorter
    prompts. `max_prompts` keeps the file's first ones. Raises ValueError for a bad file (see `load_rows`), an empty
    prompt, a tokenizer without EOS, or one without the chat template that was asked for.
    """
    eos = eos_id(tokenizer)
    if use_chat_template and not tokenizer.chat_template:
        raise ValueError(
            f"dataset.use_chat_template: the tokenizer {tokenizer.name_or_path!r} has no chat template; set it to "
            "False, or use the checkpoint of a chat model"
        )
    kinds = (str, list) if use_chat_template else str
    rows = load_rows(path, {"prompt": kinds}, name, _check_prompt)[:max_prompts]
    texts = [_render(row, tokenizer, f"{name}: {path!r}") if use_chat_template else row["prompt"] for row in rows]
    # A template writes the special tokens itself.
    options: dict[str, Any] = {"padding": False, "truncation": False, "return_attention_mask": False, "verbose": False}
    encoded: Any = tokenizer(texts, add_special_tokens=not use_chat_template, **options)
    tokens = [_open_end(ids, text, tokenizer) for ids, text in zip(encoded["input_ids"], texts, strict=True)]
    if empty := [row["id"] for row, ids in zip(rows, tokens, strict=True) if not ids]:
        raise ValueError(f"{name}: {path!r}: the prompt with id {empty[0]!r} has no tokens; remove it or write one")
    if num_cut := sum(len(ids) > max_prompt_len for ids in tokens):
        cut = "have more tokens than max_prompt_len=%d and lose those at their end"
        _log.warning("%s: %d of %d prompts " + cut, name, num_cut, len(rows), max_prompt_len)
    tokens = [ids[:max_prompt_len] for ids in tokens]
    if pad_to_max_length:
        tokens = [[eos] * (max_prompt_len - len(ids)) + ids for ids in tokens]
    return PromptDataset(
        ids=tuple(row["id"] for row in rows),
        rows=tuple(rows),
        texts=tuple(texts),
        tokens=np.concatenate([np.array(ids, np.int32) for ids in tokens]),
        offsets=np.cumsum([0, *map(len, tokens)], dtype=np.int64),
    )


def _check_prompt(row: dict[str, Any], subject: str) -> None:
    prompt = row["prompt"]
    if not prompt:
        raise ValueError(f"{subject}: 'prompt' is empty; write one, or remove the row")
    messages: Sequence[Any] = prompt if isinstance(prompt, list) else ()
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(
                f"{subject}: message {number} of 'prompt' is not an object with the strings 'role' and 'content'"
            )


def _render(row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase", subject: str) -> str:
    """Returns the text of a prompt in the tokenizer's chat template, up to where the answer begins."""
    from jinja2 import TemplateError  # what transformers renders with

    prompt = row["prompt"]
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    try:
        text: Any = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(
            f"{subject}: the tokenizer's chat template refuses the prompt with id {row['id']!r} ({error}); mend its "
            "messages, or set dataset.use_chat_template=False"
        ) from error
    return text


def _open_end(ids: list[int], text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Returns the tokens of a prompt without the EOS that some tokenizers add by themselves: the answer goes on."""
    has_own = text.endswith(str(tokenizer.eos_token))
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id and not has_own else ids
