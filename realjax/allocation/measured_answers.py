"""How long the answers of an earlier run were, and how many prompts were of use, from the record of its steps."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean

from realjax.allocation.workload import Lengths
from realjax.dataflow.run import METRICS_FILE

LAST_STEPS = 32  # answers change while a model learns
# What `algorithms.returns.answer_metrics` reports, by the end of the names.
MEAN, SPREAD, MOST = "avg_response_len", "std_response_len", "max_response_len"
OF_USE = "informative_share"  # what `runtime.draws` reports


def has_record(path: Path) -> bool:
    """Returns whether a log directory has the record of a run."""
    return (path / METRICS_FILE).is_file()


def read_answers(path: Path) -> Lengths | None:
    """Returns the lengths of answers in the last steps that a run recorded in its log directory.

    None where no step has any. Raises ValueError where there is no record.
    """
    if not has_record(path):
        raise ValueError(f"planner.answers_from: '{path}' has no {METRICS_FILE}; name the log directory of a run")
    steps = _list_last(path, (MEAN, SPREAD, MOST))
    if not steps:
        return None
    return Lengths(
        mean=fmean(step[MEAN] for step in steps),
        mean_square=fmean(step[MEAN] ** 2 + step[SPREAD] ** 2 for step in steps),
        longest=round(max(step[MOST] for step in steps)),
    )


def read_share_of_use(path: Path) -> float | None:
    """Returns the share of drawn prompts whose answers differed in reward, in the last steps that a run recorded.

    None where no step has any, or there is no record.
    """
    steps = _list_last(path, (OF_USE,)) if has_record(path) else ()
    return fmean(step[OF_USE] for step in steps) if steps else None


def _list_last(path: Path, names: Sequence[str]) -> Sequence[Mapping[str, float]]:
    """Returns the measures of the last training steps that have all of these, the last one first."""
    lines = (path / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    return list(islice(_list_steps(lines, names), LAST_STEPS))


def _list_steps(lines: Sequence[str], names: Sequence[str]) -> Iterator[Mapping[str, float]]:
    for line in reversed(lines):
        try:
            values = json.loads(line)
        except json.JSONDecodeError:  # a line that a killed run did not finish
            continue
        found = {name.rsplit("/", 1)[-1]: value for name, value in values.items()}
        if values["kind"] == "train" and all(found.get(name) is not None for name in names):
            yield found
