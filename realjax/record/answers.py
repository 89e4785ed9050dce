"""The file of answers: texts from tokens, written in the prompts' order, whole or clearly named as a part."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from realjax.core.batch import Batch
from realjax.core.faults import naming
from realjax.core.texts import cut_at, split_answer
from realjax.data.packing import unpack
from realjax.dataflow.run import AnswerFile, DecodeFn

PART = ".part"
TEXT_KEYS = ("tokens", "loss_mask", "prompt_id", "sample_id", "rewards", "num_turns", "segment_ids", "positions")
Line = dict[str, object]
# In front of what the model said in a conversation, and of what was said to it.
SPEAKERS = ("[model]", "[environment]")


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """A sequence of a rollout as texts, and its arrays by key: those of TEXT_KEYS that the rollout has."""

    prompt: str
    text: str
    arrays: dict[str, np.ndarray]


def read_texts(rollout: Batch, decode_fn: DecodeFn, most: int | None = None) -> list[Answer]:
    """Returns the answers of a batch of host arrays, at most so many, in the order of prompts and samples."""
    keys = [key for key in TEXT_KEYS if key in rollout]
    place = lambda sequence: (int(sequence["prompt_id"]), int(sequence["sample_id"]))
    sequences = sorted(unpack(rollout.select(keys)), key=place)[:most]
    texts = zip(*decode_sequences(sequences, decode_fn), sequences, strict=True)
    return [Answer(prompt=prompt, text=text, arrays=arrays) for prompt, text, arrays in texts]


def decode_sequences(sequences: Sequence[Mapping[str, np.ndarray]], decode_fn: DecodeFn) -> tuple[list[str], list[str]]:
    """Returns the texts of prompts, and of what follows them: in a conversation each side's words, marked."""
    split = [split_answer(sequence["tokens"], sequence["loss_mask"]) for sequence in sequences]
    prompts, answers = decode_fn(*([parts[side] for parts in split] for side in (0, 1)))
    marked = [_mark_turns(sequence, decode_fn) for sequence in sequences]
    return prompts, [text or answer for text, answer in zip(marked, answers, strict=True)]


def _mark_turns(sequence: Mapping[str, np.ndarray], decode_fn: DecodeFn) -> str | None:
    """Returns the text of a conversation after its prompt, each side's part by itself; None for a single answer.

    `num_turns` says that it is a conversation, also where it ended with the first answer.
    """
    tokens, mask = sequence["tokens"], sequence["loss_mask"].astype(bool)
    edges = np.flatnonzero(np.diff(mask)) + 1
    parts = np.split(tokens, edges)[0 if mask[:1].any() else 1 :]
    if not parts or (len(parts) < 3 and "num_turns" not in sequence):
        return None
    _, texts = decode_fn([[] for _ in parts], [part.tolist() for part in parts])
    return "\n".join(f"{SPEAKERS[i % 2]} {text.strip()}" for i, text in enumerate(texts))


def make_lines(rollout: Batch, file: AnswerFile, decode_fn: DecodeFn) -> list[Line]:
    """Returns the lines of the file for a step's answers: prompt, answer, seq, id, sample.

    `prompt` is the data's own; `seq` is prompt and answer as the model has them, both without special tokens. `sample`
    is there when prompts have several answers.
    """
    lines = []
    for answer in read_texts(rollout, decode_fn):
        row, kept = file.rows[int(answer.arrays["prompt_id"])], cut_at(answer.text, file.stop)
        line = {"prompt": row["prompt"], "answer": kept, "seq": answer.prompt + kept, "id": row["id"]}
        lines.append(line | ({"sample": int(answer.arrays["sample_id"])} if file.num_samples > 1 else {}))
    return lines


class AnswerWriter:
    """Lines of answers in the making: `<name>.part` until `finish` gives the file its name."""

    def __init__(self, path: Path, num_lines: int) -> None:
        """Keeps the first `num_lines` of what is there. Raises ValueError where there are fewer."""
        self.path, self.part = path, path.with_name(path.name + PART)
        if path.exists():
            os.replace(path, self.part)
        lines = self.part.read_bytes().splitlines(keepends=True) if self.part.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")]
        if len(whole) < num_lines:
            raise ValueError(
                f"recover: '{self.part}' holds {len(whole)} answers, but {num_lines} were written before; restore the "
                "file, or set recover_mode=disabled to start anew"
            )
        if lines:
            os.truncate(self.part, sum(map(len, whole[:num_lines])))

    def append(self, lines: Sequence[Line]) -> None:
        """Adds answers; they are on the disk when this returns."""
        with naming(self.part), self.part.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Gives the whole file its name."""
        if self.part.exists():
            os.replace(self.part, self.path)
