"""From tokens to texts: an answer is read where it stands, after its prompt."""

from collections.abc import Sequence
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def decode_answers(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> tuple[list[str], list[str]]:
    """Returns the texts of prompts and of the answers to them, without special tokens.

    prompt + answer is always the text of the whole sequence: a space that the tokenizer drops where a text begins stays
    before the answer, and a character whose first bytes end a prompt is the answer's.
    """
    wholes = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    starts, texts = _decode(tokenizer, prompts), _decode(tokenizer, wholes)
    starts = [commonprefix([start, text]) for start, text in zip(starts, texts, strict=True)]
    return starts, [text[len(start) :] for start, text in zip(starts, texts, strict=True)]


def _decode(tokenizer: "PreTrainedTokenizerBase", sequences: Sequence[Sequence[int]]) -> list[str]:
    # Some tokenizers tidy spaces before punctuation by default, which changes the text.
    lists = [list(tokens) for tokens in sequences]
    texts: Any = tokenizer.batch_decode(lists, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return texts
