"""From texts to tokens: each special token once, whoever wrote it, the text or the tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import TYPE_CHECKING

from realjax.data.chat import Passage, Span

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import BatchEncoding, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """The tokens of a text, and those of its parts that were asked for: first, and one past the last."""

    tokens: list[int]
    spans: tuple[Span, ...]


def encode(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", *, is_rendered: bool = False) -> list[list[int]]:
    """Returns the tokens of texts that something may follow: whole, with BOS where the tokenizer puts one in front.

    A text that begins with BOS already gets no second one, and a chat template (`is_rendered`) writes its own. An EOS
    that the tokenizer adds by itself is left out.
    """
    front = [] if is_rendered else front_tokens(tokenizer)
    found = _call(texts, tokenizer)["input_ids"]
    return [ids if ids[: len(front)] == front else [*front, *ids] for ids in found]


def encode_passages(passages: Sequence[Passage], tokenizer: "PreTrainedTokenizerBase") -> list[Encoded]:
    """Returns the tokens of passages as `encode` does, with the tokens of their spans.

    A token that ends after a span's first character, and begins before its end, is the span's. All passages are
    rendered, or none.
    """
    is_rendered = bool(passages) and passages[0].is_rendered
    texts = [passage.text for passage in passages]
    if not tokenizer.is_fast:
        return [_encode_by_parts(passage, tokenizer) for passage in passages]
    found = _call(texts, tokenizer)
    front = [] if is_rendered else front_tokens(tokenizer)
    result = []
    for passage, ids, encoding in zip(passages, found["input_ids"], found.encodings or (), strict=True):
        start = [] if ids[: len(front)] == front else front
        spans = (_find_tokens(encoding, span, len(passage.text)) for span in passage.spans)
        shifted = tuple((first + len(start), end + len(start)) for first, end in spans)
        result.append(Encoded(tokens=[*start, *ids], spans=shifted))
    return result


def _find_tokens(encoding: "Encoding", span: Span, num_chars: int) -> Span:
    """Returns the tokens that hold any of a text's characters in the span; the place where they would be if none does.

    Asked of the tokenizer character by character: lists of all offsets take ten times as long to make.
    """
    num_tokens, (start, end) = len(encoding.ids), span
    first = _token_from(encoding, start, num_chars)
    if end >= num_chars:
        return first, num_tokens
    last = _token_from(encoding, end, num_chars)
    # A token that holds characters of both sides of the end is the span's, and so is one of several for a character.
    while last < num_tokens and (at := encoding.token_to_chars(last)) is not None and at[0] < end <= at[1]:
        last += 1
    return first, max(first, last)


def _token_from(encoding: "Encoding", char: int, num_chars: int) -> int:
    """Returns the first token that ends after the character; the number of tokens where none does."""
    tokens = (encoding.char_to_token(at) for at in range(char, num_chars))
    return next((token for token in tokens if token is not None), len(encoding.ids))


def _encode_by_parts(passage: Passage, tokenizer: "PreTrainedTokenizerBase") -> Encoded:
    """Returns what `encode_passages` does for a tokenizer that does not know where its tokens stand.

    A text up to a place is what its own tokens and the whole text's have in common.
    """
    places = [place for span in passage.spans for place in span]
    whole, *parts = encode(
        [passage.text, *(passage.text[:place] for place in places)], tokenizer, is_rendered=passage.is_rendered
    )
    counts = [len(commonprefix([whole, part])) for part in parts]
    spans = [
        (first, len(whole) if end >= len(passage.text) else last)
        for (_, end), first, last in zip(passage.spans, counts[::2], counts[1::2], strict=True)
    ]
    return Encoded(tokens=whole, spans=tuple(spans))


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


@dataclass(kw_only=True)
class RepeatCount:
    """Counts texts that begin, and answers that end, with the special token that they would be given."""

    tokenizer: "PreTrainedTokenizerBase"
    num_texts: int = 0
    num_starts: int = 0
    num_answers: int = 0
    num_ends: int = 0
    _has_front: bool | None = None

    def add_starts(self, texts: Sequence[str]) -> None:
        """Looks at the beginnings of texts that no template wrote."""
        if self._has_front is None:
            self._has_front = bool(front_tokens(self.tokenizer))
        self.num_texts += len(texts)
        self.num_starts += sum(text.startswith(str(self.tokenizer.bos_token)) for text in texts) * self._has_front

    def add_ends(self, answers: Sequence[str]) -> None:
        """Looks at the ends of answers."""
        self.num_answers += len(answers)
        self.num_ends += sum(text.endswith(str(self.tokenizer.eos_token)) for text in answers)

    def notes(self) -> list[str]:
        """Returns what there is to say, in lines."""
        found = [
            (self.num_starts, self.num_texts, "texts begin", self.tokenizer.bos_token),
            (self.num_ends, self.num_answers, "answers end", self.tokenizer.eos_token),
        ]
        return [
            f"{count} of {total} {what} with {token} already, and get no second one"
            for count, total, what, token in found
            if count
        ]


def _call(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", *, adds_special: bool = False) -> "BatchEncoding":
    # The caller truncates, as a tokenizer's files may set another side or length; verbose would remark on long texts.
    return tokenizer(
        list(texts),
        add_special_tokens=adds_special,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        verbose=False,
    )
