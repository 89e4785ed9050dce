"""What was predicted of a run beside what it measured: in its record, its log and its report."""

from collections.abc import Mapping
from statistics import median

from realjax.record.report import Section
from realjax.record.spread import Spread

PREFIX = "predicted/"  # in front of a metric's name
TIME, MEMORY, STEP = "time/", "memory_mib/", "seconds"  # as `CallRecord.metrics` and a step's record have them
COLUMNS = ("", "seconds predicted", "measured", "error", "MiB predicted", "measured", "error")


class Forecast:
    """Collects what steps took that compiled nothing. `predicted` is by the names under which a run logs the same.

    `source` says what the predictions go by.
    """

    def __init__(self, predicted: Mapping[str, float], source: str) -> None:
        self.predicted, self.source = predicted, source
        self._measured = {name: Spread[float]() for name in predicted}

    def metrics(self) -> dict[str, float]:
        """Returns the predictions under names of their own, for each step's record."""
        return {f"{PREFIX}{name}": value for name, value in self.predicted.items()}

    def add(self, values: Mapping[str, float]) -> None:
        """Takes in what a step measured."""
        for name, found in self._measured.items():
            if name in values:
                found.add(values[name])

    def measured(self) -> dict[str, float]:
        """Returns the medians of all that was measured, by name."""
        return {name: median(found.values) for name, found in self._measured.items() if found.values}

    @property
    def title(self) -> str:
        num_steps = max((found.count for found in self._measured.values()), default=0)
        steps = f"medians of {num_steps} steps that compiled nothing" if num_steps else "no step without compiling"
        return f"Predicted by {self.source}, and measured: {steps}"

    def rows(self) -> list[tuple[str, ...]]:
        """Returns a row for each call, and one for the step: texts under `COLUMNS`."""
        measured = self.measured()
        calls = [name.removeprefix(TIME) for name in self.predicted if name.startswith(TIME)]
        names = [(call, TIME + call, MEMORY + call) for call in calls] + [("step", STEP, "")]
        return [
            (label, *self._cells(seconds, measured, ".3f"), *self._cells(memory, measured, ",.0f"))
            for label, seconds, memory in names
        ]

    def _cells(self, name: str, measured: Mapping[str, float], style: str) -> tuple[str, str, str]:
        if name not in self.predicted:
            return "", "", ""
        predicted = self.predicted[name]
        if (found := measured.get(name)) is None:
            return format(predicted, style), "", ""
        return format(predicted, style), format(found, style), f"{predicted / max(found, 1e-9) - 1:+.0%}"

    def section(self) -> Section:
        """Returns the table of the report."""
        return Section(title=self.title, columns=COLUMNS, rows=tuple(self.rows()))

    def text(self) -> str:
        """Returns the same as lines of a log."""
        table = [COLUMNS, *self.rows()]
        widths = [max(len(row[i]) for row in table) for i in range(len(COLUMNS))]
        lines = ("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table)
        return "\n".join([self.title, *lines])
