"""The file of answers: texts from tokens, written in the prompts' order, whole or clearly named as a part."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from realjax.core.faults import naming
from realjax.core.json_text import parse_json
from realjax.core.processes import from_first, is_first
from realjax.core.texts import cut_at, decode_answers
from realjax.dataflow.generation_run import GenerationSpec
from realjax.engine.batching import Generation, Request
from realjax.hf.files import read_json
from realjax.record.metrics import replace_text
from realjax.record.rundir import set_aside
from realjax.runtime.resume import compare

logger = logging.getLogger("realjax.generation")
PART = ".part"
IDENTITY_FILE = "identity.json"


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


class AnswerFile:
    """Lines of answers in the making: `<name>.part` until `finish` gives the file its name."""

    def __init__(self, path: Path) -> None:
        self.path, self.part = path, path.with_name(path.name + PART)

    def append(self, lines: Sequence[dict[str, Any]]) -> None:
        """Adds the answers to some prompts; they are on disk when this returns."""
        with naming(self.part), self.part.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Gives the whole file its name."""
        if self.part.exists():
            os.replace(self.part, self.path)

    def count_answered(self, rows: Sequence[Mapping[str, Any]], num_samples: int) -> int:
        """Returns how many prompts have all their answers. Raises ValueError when they are not those of the rows."""
        lines = [self._parse(line, number) for number, line in enumerate(self._whole_lines(), 1)]
        num_prompts = len(lines) // num_samples
        found = [(line.get("id"), line.get("prompt")) for line in lines[: num_prompts * num_samples]]
        if found != [(row["id"], row["prompt"]) for row in rows[:num_prompts] for _ in range(num_samples)]:
            raise ValueError(
                f"recover: the answers in '{self.path}' are not those to the first prompts of dataset.path; continue "
                "with the same data, or use another trial_name"
            )
        return num_prompts

    def keep_answered(self, num_lines: int) -> None:
        """Drops what a stop in mid-write left after the lines of prompts that have all their answers."""
        size = sum(map(len, self._whole_lines()[:num_lines]))
        if self.path.exists():
            os.replace(self.path, self.part)  # a whole file, but the data may have grown since
        if self.part.exists():
            os.truncate(self.part, size)

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        subject = f"recover: '{self.path}' line {number}"
        try:
            answer = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{subject}: {error}; restore the file, or use another trial_name") from error
        return answer if isinstance(answer, dict) else {}

    def _whole_lines(self) -> list[bytes]:
        file = self.path if self.path.exists() else self.part
        lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
        return [line for line in lines if line.endswith(b"\n")]


def describe_answers(spec: GenerationSpec) -> str:
    """Returns what of the answers is safe, and how to go on."""
    part = AnswerFile(spec.paths.logs / spec.output_file).part if spec.output_file else None
    if part is None or not part.exists():
        return "no answers are kept; give the command again once that is mended"
    return (
        f"the answers so far are in {part}; once that is mended, the same command with recover_mode=auto goes on from "
        "there"
    )


def find_done(spec: GenerationSpec) -> int | None:
    """Returns how many prompts an earlier run has answered, or None for a run that starts anew; changes nothing.

    Raises ValueError when recover_mode=resume finds nothing to continue from, or the answers there are of another run.
    """
    num_done, file = None, _answer_file(spec)
    if is_first() and spec.recover_mode in ("auto", "resume"):
        has_answers = file is not None and (file.path.exists() or file.part.exists())
        if spec.recover_mode == "resume" and not has_answers:
            raise ValueError(
                f"recover_mode: resume, but {spec.paths.logs} holds no answers; use recover_mode=auto to start when "
                "there are none"
            )
        if file is not None and has_answers:
            saved = read_json(spec.paths.logs / IDENTITY_FILE, f"recover: the answers in {spec.paths.logs}: identity")
            compare(saved, spec.identity, f"the file of answers in {spec.paths.logs}")
            num_done = file.count_answered(spec.prompts.rows, spec.num_samples)
    num_done = int(from_first(-1 if num_done is None else num_done))
    return None if num_done < 0 else num_done


def open_run(spec: GenerationSpec, num_done: int | None) -> AnswerFile | None:
    """Prepares the log directory, and returns the file, or None where another process writes it or nobody.

    A run that starts anew (`num_done` None) sets an earlier one's log directory aside.
    """
    if not is_first():
        from_first(0)  # the directory is there before another process looks
        return None
    file = _answer_file(spec)
    if num_done is None:
        set_aside([spec.paths.logs])
    elif file is not None:
        file.keep_answered(num_done * spec.num_samples)
    spec.paths.logs.mkdir(parents=True, exist_ok=True)
    replace_text(spec.paths.logs / "config.json", spec.config_json)
    if file is not None:
        replace_text(spec.paths.logs / IDENTITY_FILE, json.dumps(asdict(spec.identity), indent=2))
    from_first(0)
    return file


def _answer_file(spec: GenerationSpec) -> AnswerFile | None:
    return AnswerFile(spec.paths.logs / spec.output_file) if spec.output_file else None
