"""Rows of published measurements, as files of them spell them."""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from realjax.allocation.cluster import Cluster
from realjax.allocation.cost import Cost
from realjax.allocation.workload import Workload


@dataclass(frozen=True, kw_only=True)
class SearchedStep:
    """The plan that a search found: seconds of its step, and a line a call."""

    seconds: float
    plan: str


SearchFn = Callable[[Workload, Cluster], SearchedStep]
COLUMNS = ("kind", "model", "gpus", "gpu", "layout", "batch", "seq_or_prompt+gen", "measured", "unit", "source")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A measurement as it is written."""

    line: int
    kind: str
    model: str
    num_gpus: int
    gpu: str
    layout: str
    batch: int | None
    lengths: str
    measured: float
    unit: str
    source: str


@dataclass(frozen=True, kw_only=True)
class RowPrediction:
    """A row with what the model says of it, in the row's unit, and why."""

    row: Row
    predicted: float
    cost: Cost
    plan: str = ""  # of a searched row

    @property
    def error(self) -> float:
        """Relative to what was measured."""
        return self.predicted / self.row.measured - 1


def read_rows(path: Path) -> list[Row]:
    """Returns the rows of a file; lines that begin with # are notes. Raises ValueError for one that cannot be read."""
    lines = [(i, text) for i, text in enumerate(path.read_text().splitlines(), 1) if text and not text.startswith("#")]
    reader = csv.DictReader(text for _, text in lines)
    if missing := set(COLUMNS) - set(reader.fieldnames or ()):
        raise ValueError(f"{path.name}: no column {', '.join(sorted(missing))}; it needs {', '.join(COLUMNS)}")
    return [_read_row(found, number, path.name) for found, (number, _) in zip(reader, lines[1:])]


def _read_row(found: dict[str, str], line: int, file: str) -> Row:
    try:
        return Row(
            line=line,
            kind=found["kind"].strip(),
            model=found["model"].strip(),
            num_gpus=int(found["gpus"]),
            gpu=found["gpu"].strip(),
            layout=found["layout"].strip(),
            batch=int(found["batch"]) if found["batch"].strip() else None,
            lengths=found["seq_or_prompt+gen"].strip(),
            measured=float(found["measured"]),
            unit=found["unit"].strip(),
            source=(found["source"] or "").strip(),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}, line {line}: {error}; a row has {', '.join(COLUMNS)}") from None
