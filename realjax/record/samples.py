"""Answers of a run's evaluations on disk, so that the first ones stand in the report of a run that was continued."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from realjax.core.faults import naming
from realjax.record.metrics import drop_later_steps, read_metrics
from realjax.record.report import Section

SAMPLES_FILE = "samples.jsonl"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One answer to a held-out prompt, for a person to read."""

    variant: str
    prompt: str
    answer: str
    reward: float


def append_samples(path: Path, step: int, samples: Sequence[Sample]) -> None:
    """Appends the answers of the evaluation after `step`, a line each."""
    with naming(path), path.open("a", encoding="utf-8") as file:
        for sample in samples:
            reward = sample.reward if math.isfinite(sample.reward) else None
            file.write(json.dumps({"step": step, **asdict(sample), "reward": reward}) + "\n")


def load_samples(path: Path, step: int) -> dict[int, list[Sample]]:
    """Returns the answers of a run that continues after `step`, by step; later ones, which come again, are removed."""
    samples: dict[int, list[Sample]] = {}
    if path.exists():
        drop_later_steps(path, step)
        for record in read_metrics(path):
            reward = math.nan if record["reward"] is None else record["reward"]
            texts = {name: record[name] for name in ("variant", "prompt", "answer")}
            samples.setdefault(record["step"], []).append(Sample(**texts, reward=reward))
    return samples


def drop_between(samples: dict[int, list[Sample]]) -> None:
    """Removes the answers of all evaluations but the first and the last: they are in the file."""
    for step in sorted(samples)[1:-1]:
        del samples[step]


def sample_sections(samples: Mapping[int, Sequence[Sample]]) -> list[Section]:
    """Returns the answers of the first and of the last evaluation, side by side."""
    if not samples:
        return []
    steps = sorted({min(samples), max(samples)})
    columns = ("draw", "prompt", *(f"after step {step}" for step in steps))
    texts = [_by_place(samples[step]) for step in steps]
    # Those of the last, beside what the first has of them: a run may have gone on with other draws.
    rows = [(*key[:2], *(of_step.get(key, "") for of_step in texts)) for key in texts[-1]]
    return [Section(title="Samples on held-out prompts", columns=columns, rows=tuple(rows), comes_first=True)]


def _by_place(samples: Sequence[Sample]) -> dict[tuple[str, str, int], str]:
    """Returns answers by draw, prompt, and which of the draw's answers to that prompt it is: prompts may be alike."""
    counts, texts = Counter[tuple[str, str]](), dict[tuple[str, str, int], str]()
    for sample in samples:
        key = (sample.variant, sample.prompt)
        texts[(*key, counts[key])] = _describe(sample)
        counts[key] += 1
    return texts


def _describe(sample: Sample) -> str:
    return sample.answer if math.isnan(sample.reward) else f"{sample.answer} (reward {sample.reward:.3g})"
