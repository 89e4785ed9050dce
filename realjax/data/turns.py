"""Conversations in turns, as token ids: what an answer's tokens are is known from its draw, and they stay as they are.

Only what others say is made into tokens: what the chat template writes between one answer and the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from os.path import commonprefix
from typing import TYPE_CHECKING

from realjax.core.json_text import JsonObject
from realjax.data.chat import Messages, Template, is_written
from realjax.data.tokens import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What stands in an answer's place while the template writes what is around it; no two end alike.
STAND_INS = ("answer", "1", "yes.")
SAID = "said"  # in a message's place


@dataclass(frozen=True, kw_only=True)
class TurnTemplate:
    """A tokenizer's chat template, with the tools that it tells the model of."""

    tokenizer: "PreTrainedTokenizerBase"
    tools: Sequence[JsonObject] = ()
    subject: str = "env.path"

    @cached_property
    def _template(self) -> Template:
        return Template(tokenizer=self.tokenizer, subject=self.subject, tools=tuple(self.tools))

    def render(self, messages: Messages, opens_answer: bool) -> str:
        """Returns the template's text of messages. Raises ValueError where it refuses them."""
        return self._template.render(messages, None, opens_answer=opens_answer)

    def open(self, messages: Messages, row_id: object) -> list[int]:
        """Returns the tokens of a conversation's first messages, up to where the first answer begins."""
        return encode([self._template.render(messages, row_id)], self.tokenizer, is_rendered=True)[0]

    def read(self, answer: Sequence[int]) -> str:
        """Returns an answer's text, its special tokens among it: calls of tools may begin with one."""
        return str(self.tokenizer.decode(list(answer), clean_up_tokenization_spaces=False))

    def frames(self) -> list[tuple[str, str]]:
        """Returns what the template writes before and behind a message that follows an answer, without special tokens:
        a user's, and a tool's where it knows them.
        """
        found, question = [], [{"role": "user", "content": STAND_INS[0]}]
        for role in ("user", "tool"):
            try:
                tokens = self.follow([question, [{"role": role, "content": SAID}]], -1, 0)
            except ValueError:
                continue
            text = str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
            before, said, after = text.partition(SAID)
            found += [(before, after)] if said else []
        return found

    def follow(self, rounds: Sequence[Messages], last_token: int, row_id: object) -> list[int]:
        """Returns the tokens between an answer, whose last token this is, and where the next one begins.

        `rounds` are the messages before the first answer, those between it and the second, and so on; the last ones are
        those to be written. What ends an answer is not written again where its last token does so already.
        """
        texts = [self._render(rounds, stand_in, row_id) for stand_in in STAND_INS]
        backwards = commonprefix([text[::-1] for text in texts])
        after = backwards[::-1]
        if not rounds[-1] or not all(is_written(message["content"], after) for message in rounds[-1]):
            raise ValueError(
                f"{self.subject}: the tokenizer's chat template does not write what follows an answer of the row with "
                f"id {row_id!r} behind it; use a template that only adds to a conversation"
            )
        tokens = self._encode_after(texts, after)
        return tokens[1:] if tokens[:1] == [last_token] else tokens

    def _render(self, rounds: Sequence[Messages], stand_in: str, row_id: object) -> str:
        """Returns the text of the conversation, its last answer being `stand_in`."""
        messages = list(rounds[0])
        for number, more in enumerate(rounds[1:], start=2):
            content = stand_in if number == len(rounds) else STAND_INS[0]
            messages += [{"role": "assistant", "content": content}, *more]
        return self._template.render(messages, row_id)

    def _encode_after(self, texts: Sequence[str], after: str) -> list[int]:
        """Returns the tokens of the text at the end of `texts`: what they have more than those of the text before it.

        Where every stand-in grows together with what follows it into one token, those of the text alone.
        """
        for text in texts:
            before, whole = encode([text[: len(text) - len(after)], text], self.tokenizer, is_rendered=True)
            if whole[: len(before)] == before:
                return whole[len(before) :]
        return encode([after], self.tokenizer, is_rendered=True)[0]
