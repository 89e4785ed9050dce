"""From tokens to texts: an answer is read where it stands, after its prompt, and up to a text that ends it."""

from collections.abc import Callable, Sequence
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a decoder writes for the bytes of a character that is not complete.
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def split_answer(tokens: np.ndarray, is_answer: np.ndarray) -> tuple[list[int], list[int]]:
    """Returns a sequence's prompt and what follows it: in a conversation, what was said between answers too."""
    first = int(np.argmax(is_answer)) if is_answer.any() else len(tokens)
    return tokens[:first].tolist(), tokens[first:].tolist()


def decode_answers(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    frames: Sequence[tuple[str, str]] = (),
) -> tuple[list[str], list[str]]:
    """Returns the texts of prompts and of the answers to them, without special tokens.

    prompt + answer is always the text of the whole sequence: a space that the tokenizer drops where a text begins stays
    before the answer, and a character whose first bytes end a prompt is the answer's. Only what has no prompt, and
    stands between one of the `frames`, is given without it: what was said in a conversation, without the template's
    words.
    """
    starts, texts = _split_texts(tokenizer, prompts, answers)
    return starts, [text if start else _unframe(text, frames) for start, text in zip(starts, texts, strict=True)]


def _unframe(text: str, frames: Sequence[tuple[str, str]]) -> str:
    for before, after in frames:
        if len(text) >= len(before) + len(after) and text.startswith(before) and text.endswith(after):
            return text[len(before) : len(text) - len(after)]
    return text


def _split_texts(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> tuple[list[str], list[str]]:
    wholes = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    starts, texts = _decode(tokenizer, prompts), _decode(tokenizer, wholes)
    starts = [commonprefix([start, text]) for start, text in zip(starts, texts, strict=True)]
    return starts, [text[len(start) :] for start, text in zip(starts, texts, strict=True)]


def _decode(tokenizer: "PreTrainedTokenizerBase", sequences: Sequence[Sequence[int]]) -> list[str]:
    # Some tokenizers tidy spaces before punctuation by default, which changes the text.
    lists = [list(tokens) for tokens in sequences]
    texts: Any = tokenizer.batch_decode(lists, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return texts


def cut_at(text: str, stop: Sequence[str]) -> str:
    """Returns the text before the first place where one of `stop` begins."""
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))]


def make_stop_fn(
    tokenizer: "PreTrainedTokenizerBase", stop: Sequence[str]
) -> Callable[[np.ndarray, np.ndarray, int], bool]:
    """Returns `fn(prompt, answer, num_seen)`: whether it is known where `cut_at` cuts the answer's text.

    It is known once a text of `stop` stands there, and no other one that begins before it can still become complete.
    The first `num_seen` tokens were looked at before: only their end, where a text of `stop` may begin, is decoded.
    """
    longest = max(map(len, stop))

    def decode_tail(prompt: np.ndarray, answer: np.ndarray, num_seen: int) -> str:
        num_back = longest
        while (first := num_seen - num_back) > 0:
            seen, new = decode_answers(tokenizer, [answer[first:num_seen].tolist()], [answer[num_seen:].tolist()])
            if len(seen[0].lstrip(INCOMPLETE)) > longest:
                return seen[0] + new[0]
            num_back *= 2
        return decode_answers(tokenizer, [prompt.tolist()], [answer.tolist()])[1][0]

    def has_stopped(prompt: np.ndarray, answer: np.ndarray, num_seen: int) -> bool:
        text = decode_tail(prompt, answer, num_seen).rstrip(INCOMPLETE)
        end = len(cut_at(text, stop))
        begins = lambda other: any(other.startswith(text[i:]) for i in range(max(0, len(text) - len(other) + 1), end))
        return end < len(text) and not any(map(begins, stop))

    return has_stopped
