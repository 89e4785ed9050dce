"""Answers of training as a person reads them: a few each so many steps, and on demand all of them, as files."""

import gzip
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import indent

import numpy as np

from realjax.core.batch import Batch
from realjax.core.faults import naming
from realjax.core.json_text import JsonObject
from realjax.data.packing import unpack
from realjax.dataflow.run import DecodeFn, RolloutRecord
from realjax.record.answers import decode_sequences
from realjax.record.metrics import drop_later_steps, read_metrics
from realjax.record.report import Section

FOLDER, SHOWN_FILE, ALL_FILE = "rollouts", "shown.jsonl", "step{:06d}.jsonl.gz"
# What is said of an answer, in this order, where its batch has it on the host.
READ_KEYS = ("rewards", "reward_terms", "has_eos", "logprobs", "ref_logprobs", "advantages", "sample_id", "num_turns")
TEXTS = ("prompt", "answer")
MOST_CHARACTERS = 400  # of a text in the log
MOST_STEPS = 6  # in the report: the first ones and the last


def describe_answers(
    rollout: Batch, decode_fn: DecodeFn, terms: Sequence[str], most: int | None = None
) -> list[JsonObject]:
    """Returns what there is to say of a rollout's answers, as plain values: texts, reward and its terms, lengths.

    `most` of them, evenly from the lowest reward to the highest; None: all, in the order of prompts and samples. `kl`
    is the mean over an answer's tokens of log-probability minus the reference's.
    """
    keys = [key for key in READ_KEYS if isinstance(rollout.get(key), np.ndarray)]
    sequences = unpack(rollout.select(["tokens", "loss_mask", "prompt_id", "segment_ids", "positions", *keys]))
    place = lambda one: (int(one["prompt_id"]), int(one.get("sample_id", 0)))
    sequences.sort(key=place)
    if most is not None and len(sequences) > most:
        # The order of prompts decides between equal ones; what has no reward comes first.
        by_reward = sorted(sequences, key=lambda one: float(np.nan_to_num(one.get("rewards", 0), nan=-np.inf)))
        chosen = np.linspace(0, len(by_reward) - 1, most).round().astype(int)
        sequences = [by_reward[i] for i in chosen]
    prompts, answers = decode_sequences(sequences, decode_fn)
    return [
        {**_measure(one, terms), "prompt": prompt, "answer": answer}
        for one, prompt, answer in zip(sequences, prompts, answers, strict=True)
    ]


def _measure(sequence: Mapping[str, np.ndarray], terms: Sequence[str]) -> JsonObject:
    mask = sequence["loss_mask"].astype(bool)
    found: JsonObject = {"prompt_id": int(sequence["prompt_id"])}
    if "sample_id" in sequence:
        found["sample"] = int(sequence["sample_id"])
    if "rewards" in sequence:
        found["reward"] = _finite(sequence["rewards"])
    if "reward_terms" in sequence:
        found["terms"] = dict(zip(terms, map(_finite, sequence["reward_terms"]), strict=True))
    if "ref_logprobs" in sequence and mask.any():
        found["kl"] = float((sequence["logprobs"] - sequence["ref_logprobs"])[mask].mean())
    if "advantages" in sequence and mask.any():
        found["advantage"] = float(sequence["advantages"][mask].mean())
    found["tokens"] = int(mask.sum())
    if "has_eos" in sequence:
        found["ended"] = bool(sequence["has_eos"])
    return found


def _finite(value: np.ndarray) -> float | None:
    """Returns a number, None for one that JSON has no word for."""
    return float(value) if np.isfinite(value) else None


class RolloutWriter:
    """Writes the answers of a run's steps below `rollouts/`, and keeps the few that are shown."""

    def __init__(self, run_dir: Path, options: RolloutRecord, decode_fn: DecodeFn, resume_step: int = 0) -> None:
        """Goes on after `resume_step`; answers of later steps, which come again, are removed."""
        self.folder, self.options, self.decode_fn = run_dir / FOLDER, options, decode_fn
        self.shown: dict[int, list[JsonObject]] = {}
        if self._path.exists():
            drop_later_steps(self._path, resume_step)
            for record in read_metrics(self._path):
                self._keep(record["step"], [record])

    @property
    def _path(self) -> Path:
        return self.folder / SHOWN_FILE

    def _keep(self, step: int, answers: Sequence[JsonObject]) -> None:
        """Adds answers to those of the report, which are of few steps however long the run."""
        self.shown.setdefault(step, []).extend(answers)
        between = sorted(self.shown)[MOST_STEPS // 2 : -MOST_STEPS // 2]
        for one in between:
            del self.shown[one]

    def add(self, step: int, rollout: Batch) -> str | None:
        """Takes in the answers of a step, counted from 1; returns those to show, as a text of the log."""
        options, found = self.options, None
        if options.keeps_all:
            self._write_all(step, describe_answers(rollout, self.decode_fn, options.terms))
        if options.log_steps and (step == 1 or step % options.log_steps == 0):
            answers = describe_answers(rollout, self.decode_fn, options.terms, options.num_logged)
            self._keep(step, answers)
            self.folder.mkdir(exist_ok=True)
            with naming(self._path), self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": step, **one}, ensure_ascii=False) + "\n" for one in answers)
            found = "\n".join([f"answers of step {step}:", *map(describe_answer, answers)])
        return found

    def _write_all(self, step: int, answers: Sequence[JsonObject]) -> None:
        self.folder.mkdir(exist_ok=True)
        path = self.folder / ALL_FILE.format(step)
        part = path.with_name(f"{path.name}.part")
        with naming(path):
            # Without a time of its own the file depends on the answers alone.
            with part.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", filename="", mtime=0) as file:
                for answer in answers:
                    file.write(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
            os.replace(part, path)


def describe_answer(answer: JsonObject) -> str:
    """Returns an answer as lines of a log: what it is worth, then the texts, long ones cut."""
    texts = [f"{name}: {_cut(answer[name])}" for name in TEXTS]
    return f"  {describe_worth(answer)}\n" + "\n".join(indent(text, "    ") for text in texts)


def describe_worth(answer: JsonObject) -> str:
    """Returns reward, its terms, KL, advantage and length in words."""
    parts = []
    if "reward" in answer:
        terms = ", ".join(f"{name} {_show(value)}" for name, value in answer.get("terms", {}).items())
        parts.append(f"reward {_show(answer['reward'])}" + (f" ({terms})" if terms else ""))
    parts += [f"kl {answer['kl']:.3g} nats/token"] if "kl" in answer else []
    parts += [f"advantage {answer['advantage']:.3g}"] if "advantage" in answer else []
    end = (", ended" if answer["ended"] else ", cut off") if "ended" in answer else ""
    return ", ".join([*parts, f"{answer['tokens']} tokens{end}"])


def _show(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"


def _cut(text: str) -> str:
    """Returns a text on one line, its beginning alone where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= MOST_CHARACTERS else f"{line[: MOST_CHARACTERS - 4]} ..."


def rollout_sections(shown: Mapping[int, Sequence[JsonObject]]) -> list[Section]:
    """Returns the answers that a run showed as a table: of its first steps and of its last ones."""
    if not shown:
        return []
    rows = [(step, one["prompt"], one["answer"], describe_worth(one)) for step in sorted(shown) for one in shown[step]]
    columns = ("step", "prompt", "answer", "worth")
    return [Section(title="Answers of the training", columns=columns, rows=tuple(rows), comes_first=True)]
