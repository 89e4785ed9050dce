"""From texts to tokens: each special token once, whoever wrote it, the text or the tokenizer."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

Offsets = list[tuple[int, int]]  # of each token, the characters of its text: first, and one past the last


class _Found(TypedDict):
    input_ids: list[list[int]]
    offset_mapping: list[Offsets]  # only where asked for


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Tokens of texts, and where they stand in them; offsets are None where not asked for, or not to be had."""

    tokens: list[list[int]]
    offsets: list[Offsets] | None


def encode(
    texts: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    is_rendered: bool = False,
    with_offsets: bool = False,
) -> Encoded:
    """Returns the tokens of texts that something may follow: whole, with BOS where the tokenizer puts one in front.

    A text that begins with BOS already gets no second one, and a chat template (`is_rendered`) writes its own. An EOS
    that the tokenizer adds by itself is left out.
    """
    with_offsets = with_offsets and bool(tokenizer.is_fast)
    found = _call(texts, tokenizer, with_offsets=with_offsets)
    front = [] if is_rendered else front_tokens(tokenizer)
    missing = [[] if ids[: len(front)] == front else front for ids in found["input_ids"]]
    tokens = [[*start, *ids] for start, ids in zip(missing, found["input_ids"], strict=True)]
    if not with_offsets:
        return Encoded(tokens=tokens, offsets=None)
    pairs = zip(missing, found["offset_mapping"], strict=True)
    return Encoded(tokens=tokens, offsets=[[*((0, 0) for _ in start), *offsets] for start, offsets in pairs])


def front_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Returns what the tokenizer puts in front of every text by itself: BOS, or nothing."""
    whole, bare = (_call(["a"], tokenizer, adds_special=adds)["input_ids"][0] for adds in (True, False))
    return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(bare)] == bare), [])


def eos_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Id of the token that ends every answer; ValueError for a tokenizer without one."""
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise ValueError(
            f"tokenizer: {tokenizer.name_or_path!r} has no EOS token, which ends every answer; "
            "set eos_token in its tokenizer_config.json"
        )
    return eos


def tell_repeats(starts: Sequence[str], ends: Sequence[str], tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
    """Logs how many texts begin, and how many answers end, with the special token that they would be given."""
    bos, eos = str(tokenizer.bos_token), str(tokenizer.eos_token)
    has_front = bool(starts) and bool(front_tokens(tokenizer))
    if num_starts := sum(text.startswith(bos) for text in starts) if has_front else 0:
        _log.warning(
            "%s: %d of %d texts begin with %s already, and get no second one", name, num_starts, len(starts), bos
        )
    if num_ends := sum(text.endswith(eos) for text in ends):
        _log.warning("%s: %d of %d answers end with %s already, and get no second one", name, num_ends, len(ends), eos)


def _call(
    texts: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    adds_special: bool = False,
    with_offsets: bool = False,
) -> _Found:
    # The caller truncates, as a tokenizer's files may set another side or length; verbose would remark on long texts.
    found = tokenizer(
        list(texts),
        add_special_tokens=adds_special,
        return_offsets_mapping=with_offsets,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        verbose=False,
    )
    return cast(_Found, found)
