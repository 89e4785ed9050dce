"""The file of answers: texts from tokens, written in the prompts' order, whole or clearly named as a part."""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from realjax.core.json_text import parse_json
from realjax.core.texts import decode_answers
from realjax.dataflow.generation_run import GenerationSpec
from realjax.engine.generate import Generation, Request
from realjax.hf.files import read_json
from realjax.runtime.metrics import replace_text
from realjax.runtime.processes import from_first, is_first
from realjax.runtime.rundir import set_aside

logger = logging.getLogger("realjax.generation")
PART = ".part"


def make_answers(
    spec: GenerationSpec, requests: Sequence[Request], generations: Sequence[Generation]
) -> list[dict[str, Any]]:
    """Returns the lines of the file, one a request: prompt, answer, seq, id, sample.

    `prompt` is the data's own; `seq` is prompt and answer as the model has them, both without special tokens. `sample`
    is there when prompts have several answers.
    """
    prompts = [request.tokens.tolist() for request in requests]
    answers = [generation.tokens.tolist() for generation in generations]
    lines = []
    for request, start, text in zip(requests, *decode_answers(spec.tokenizer, prompts, answers), strict=True):
        row, kept = spec.prompts.rows[request.row_id], cut_at(text, spec.stop)
        line = {"prompt": row["prompt"], "answer": kept, "seq": start + kept, "id": row["id"]}
        lines.append(line | ({"sample": request.sample_id} if spec.num_samples > 1 else {}))
    return lines


def cut_at(text: str, stop: Sequence[str]) -> str:
    """Returns the text before the first place where one of `stop` begins."""
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))]


class AnswerFile:
    """Lines of answers in the making: `<name>.part` until `finish` gives the file its name."""

    def __init__(self, path: Path) -> None:
        self.path, self.part = path, path.with_name(path.name + PART)

    def append(self, lines: Sequence[dict[str, Any]]) -> None:
        """Adds the answers to some prompts; they are on disk when this returns."""
        with self.part.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Gives the whole file its name."""
        if self.part.exists():
            os.replace(self.part, self.path)

    def keep_answered(self, ids: Sequence[str | int], num_samples: int) -> int:
        """Returns how many prompts have all their answers; drops what a stop in mid-write left after them.

        Raises ValueError when the answers are not to these prompts.
        """
        file = self.path if self.path.exists() else self.part
        if not file.exists():
            return 0
        lines = [line for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        num_prompts = len(lines) // num_samples
        lines = lines[: num_prompts * num_samples]
        expected = [row_id for row_id in ids[:num_prompts] for _ in range(num_samples)]
        if [_id_of(line, f"recover: '{file}' line {number}") for number, line in enumerate(lines, 1)] != expected:
            raise ValueError(
                f"recover: the answers in '{file}' are not those to the first prompts of dataset.path; continue with "
                "the same data, or use another trial_name"
            )
        # Of a whole file too: the data may have grown since.
        os.replace(file, self.part)
        os.truncate(self.part, sum(map(len, lines)))
        return num_prompts


def _id_of(line: bytes, subject: str) -> Any:
    try:
        answer = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{subject}: {error}; restore the file, or use another trial_name") from error
    return answer.get("id") if isinstance(answer, dict) else None


def open_run(spec: GenerationSpec) -> tuple[AnswerFile | None, int]:
    """Prepares the log directory; returns the file (None: another process writes it, or nobody) and the prompts done.

    A run that starts anew sets an earlier one's log directory aside. Raises ValueError when recover_mode=resume finds
    nothing to continue from, or options that decide about the answers are not those of the answers there.
    """
    file = AnswerFile(spec.paths.logs / spec.output_file) if spec.output_file else None
    if not is_first():
        return None, int(from_first(0))
    has_answers = file is not None and (file.path.exists() or file.part.exists())
    num_done = 0
    if spec.recover_mode == "resume" and not has_answers:
        raise ValueError(
            f"recover_mode: resume, but {spec.paths.logs} holds no answers; use recover_mode=auto to start when "
            "there are none"
        )
    if file is not None and has_answers and spec.recover_mode in ("auto", "resume"):
        _refuse_other_options(spec)
        num_done = file.keep_answered(spec.prompts.ids, spec.num_samples)
    else:
        set_aside([spec.paths.logs])
    spec.paths.logs.mkdir(parents=True, exist_ok=True)
    replace_text(spec.paths.logs / "config.json", spec.config_json)
    return file, int(from_first(num_done))


def _refuse_other_options(spec: GenerationSpec) -> None:
    saved = spec.paths.logs / "config.json"
    before, now = read_json(saved, "recover: the options of the answers there"), json.loads(spec.config_json)
    if other := [name for name in spec.decisive_options if before.get(name) != now[name]]:
        raise ValueError(
            f"recover: the answers in {spec.paths.logs} were made with another {', '.join(other)}, see {saved}; "
            "continue with the same, or use another trial_name"
        )
