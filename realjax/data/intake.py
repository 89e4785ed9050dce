"""Rows of a source as a run reads them: converted, checked, in parts that are tokenised at once."""

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from realjax.core.json_text import JsonObject
from realjax.data.chat import Template, check_messages, prompt_kinds
from realjax.data.files import Source
from realjax.data.formats import Converter, Task
from realjax.data.jsonl import CheckFn, Kinds, RowReader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

# A bound on rows per call of the tokenizer, which uses all cores, bounds the memory of large files.
_ROWS_PER_PART = 8192
_SECONDS_PER_LINE = 5.0


@dataclass(kw_only=True)
class Intake:
    """Reads a source for a task. After the first part its form is known, after the last whether its rows have ids.

    `use_chat_template` None puts prompts into the template where the first row's is a list of messages. Raises
    ValueError for a template that the tokenizer lacks, and for whatever a row is wrong about.
    """

    task: Task
    source: Source
    tokenizer: "PreTrainedTokenizerBase"
    use_chat_template: bool | None = False
    check_fn: CheckFn | None = None
    template: Template | None = None
    is_numbered: bool = False
    num_rows: int = 0
    _converter: Converter | None = field(default=None, repr=False)

    def parts(self) -> Iterator[list[JsonObject]]:
        """Yields the rows in order; each part says how far it has come where that takes long."""
        if self.use_chat_template:
            self._open_template()
        self._converter = Converter(task=self.task, source=self.source)
        reader = RowReader(source=self.source, required=self._kinds, check_fn=self._check, convert_fn=self._convert)
        part, told = [], time.monotonic()
        for row in reader:
            part.append(row)
            if len(part) == _ROWS_PER_PART:
                yield part
                part = []
                if time.monotonic() - told > _SECONDS_PER_LINE:
                    told = time.monotonic()
                    _log.info("%s: %s rows tokenised so far", self.source.subject, f"{reader.num_rows:,}")
        self.is_numbered, self.num_rows = reader.finish(), reader.num_rows
        if part:
            yield part

    def _open_template(self) -> None:
        prompt_kinds(self.tokenizer, True)
        self.template = Template(tokenizer=self.tokenizer, subject=self.source.subject)

    def _convert(self, row: JsonObject, place: str) -> JsonObject:
        converter = self._converter
        assert converter is not None, "parts made it"
        is_first = converter.form is None
        converted = converter(row, place)
        if is_first:
            converter.tell()
            if self.use_chat_template is None and converter.is_chat:
                self._open_template()
        if self.template is None and "num_given" in converted:
            raise ValueError(
                f"{place}: a conversation needs the tokenizer's chat template, but dataset.use_chat_template=False; "
                "leave it out"
            )
        return converted

    def _kinds(self, row: JsonObject) -> Mapping[str, Kinds]:
        if "num_given" in row:
            return {"messages": list}
        if self._converter and self._converter.form and self._converter.form.keys == ("text",):
            return {"text": str}
        text: Kinds = str if self.template is None else (str, list)
        needed: dict[str, Kinds] = {"prompt": text}
        if self.task == "pairs":
            return {**needed, "pos_answers": list, "neg_answers": list}
        if self.task == "answers":
            return {**needed, "answer": str}
        return {**needed, "answer": text, "label": bool} if self.task == "labels" else needed

    def _check(self, row: JsonObject, place: str) -> None:
        if "prompt" in row and "num_given" not in row:
            check_messages(row, place)
        if self.check_fn is not None:
            self.check_fn(row, place)
