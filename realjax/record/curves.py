"""Charts of what runs recorded: which metrics have one, in which order, and their pictures."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from realjax.core.json_text import JsonObject
from realjax.record.metrics import RECORD_KEYS

# Shown first, in this order; a name counts by its last part, so `actor/loss` stands with `loss`.
MAIN_METRICS = (
    *("task_reward", "acc", "margin", "kl", "avg_response_len", "loss", "ppl", "eos_share", "actor_loss", "value_loss"),
    *("importance_weight", "actor_clip_ratio", "lr", "grad_norm", "tokens_per_second"),
)
TRAIN, EVAL = "train", "eval"
COLORS = {TRAIN: "#2563eb", EVAL: "#ea580c"}
OTHER_COLORS = ("#ea580c", "#059669", "#9333ea", "#475569", "#db2777", "#0891b2")
MIN_POINTS_TO_SMOOTH = 50
MOST_MARKED = 12  # points that are shown as such

# {label: (steps, values)} of one chart, steps ascending.
Series = dict[str, tuple[np.ndarray, np.ndarray]]
Points = dict[str, dict[str, dict[int, float]]]  # by chart, label and step


def metric_rank(name: str) -> int:
    """Place of a metric in the report; all but the main ones share the last."""
    last_part = name.rsplit("/", 1)[-1]
    return MAIN_METRICS.index(last_part) if last_part in MAIN_METRICS else len(MAIN_METRICS)


def sort_metrics(values: Mapping[str, float]) -> dict[str, float]:
    """Returns metrics by name, the main ones first."""
    return {name: values[name] for name in sorted(values, key=lambda name: (metric_rank(name), name))}


def collect_series(records: Iterable[JsonObject]) -> dict[str, Series]:
    """Charts by name: numeric values of >= 2 steps in some kind, in the order of `MAIN_METRICS`, then by name.

    An evaluation's `greedy/kl` stands in the chart of the training's `kl`. The last record of a step counts; non-finite
    values (null in the file) are left out, as are metrics that never change: of the many counters of a run few have a
    curve to look at.
    """
    points = _collect_points(records)
    charts = {}
    for name in sorted(points, key=lambda name: (metric_rank(name), name)):
        values = {value for by_step in points[name].values() for value in by_step.values()}
        if max(map(len, points[name].values())) >= 2 and (len(values) > 1 or metric_rank(name) < len(MAIN_METRICS)):
            charts[name] = {
                label: (np.array(sorted(by_step)), np.array([by_step[step] for step in sorted(by_step)], float))
                for label, by_step in points[name].items()
            }
    return charts


def _collect_points(records: Iterable[JsonObject]) -> Points:
    found: Points = {}
    for record in records:
        for name, value in record.items():
            if name not in RECORD_KEYS and isinstance(value, int | float):
                found.setdefault(name, {}).setdefault(record["kind"], {})[record["step"]] = value
    trained = {name for name, of_kind in found.items() if TRAIN in of_kind}
    points: Points = {}
    for name, of_kind in found.items():
        for kind, by_step in of_kind.items():
            chart, prefix = (name, "") if kind == TRAIN else _find_chart(name, trained)
            points.setdefault(chart, {})[f"{kind} {prefix}".rstrip()] = by_step
    return points


def _find_chart(name: str, trained: set[str]) -> tuple[str, str]:
    """Returns the training's metric that one of an evaluation measures, and what stands before it in its name."""
    parts = name.split("/")
    for first in range(len(parts)):
        if (base := "/".join(parts[first:])) in trained:
            return base, "/".join(parts[:first])
    return name, ""


def join_equal(charts: Mapping[str, Series]) -> dict[str, tuple[str, ...]]:
    """Returns, for each chart to draw, the names of the later ones that would show the same."""
    drawn: dict[str, tuple[str, ...]] = {}
    for name, series in charts.items():
        same = next((other for other in drawn if _are_equal(charts[other], series)), None)
        if same is None:
            drawn[name] = ()
        else:
            drawn[same] = (*drawn[same], name)
    return drawn


def _are_equal(one: Series, other: Series) -> bool:
    return one.keys() == other.keys() and all(
        np.array_equal(a, b) for label in one for a, b in zip(one[label], other[label], strict=True)
    )


class Sheet:
    """Draws one chart after another on the same axes: axes of its own for each would take three times as long."""

    def __init__(self) -> None:
        # Imported here: it takes a second, which nobody should wait for before the first step.
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        # Margins that are wide enough for every label, which stand in known places: to measure them takes as long as to
        # draw, and a run has many curves.
        margins = {"left": 0.17, "right": 0.98, "bottom": 0.14, "top": 0.96}
        self.figure = Figure(figsize=(6.4, 3.4), dpi=120)
        self.axes = axes = self.figure.subplots(gridspec_kw=margins)
        axes.set_xlabel("global step")
        axes.xaxis.set_label_coords(0.5, -0.105)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        # Ticks show whole values: "+1.2e4" in a corner of the plot is easily missed.
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.grid(color="#e5e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)

    def draw(self, path: Path | BinaryIO, series: Series) -> None:
        """Writes one PNG: a line per label, and for many points a smoothed line over the light raw one.

        What it shows is the page's to say, and the file's name.
        """
        axes, other_colors = self.axes, iter(OTHER_COLORS * len(series))
        for label, (steps, values) in sorted(series.items(), key=lambda item: item[0] != TRAIN):
            color = COLORS.get(label) or next(other_colors)
            marker = "o" if len(steps) <= MOST_MARKED else None
            if len(steps) > MIN_POINTS_TO_SMOOTH:
                axes.plot(steps, values, color=color, alpha=0.25, linewidth=1)
                values = smooth(values, window=max(5, len(values) // 25))
            # A label is data, as a metric's name is: a `$` in it must not start a formula.
            shown = label.replace("$", "\\$")
            axes.plot(steps, values, color=color, linewidth=1.8, marker=marker, markersize=4, label=shown)
        legend = axes.legend(frameon=False) if len(series) > 1 else None
        self.figure.savefig(path)
        for artist in (*axes.lines, *filter(None, [legend])):
            artist.remove()
        axes.relim()


def smooth(values: np.ndarray, *, window: int) -> np.ndarray:
    """Centred moving mean over up to `window` values, evenly fewer at the ends: a straight line stays one."""
    index = np.arange(len(values))
    half = np.minimum(window // 2, np.minimum(index, index[::-1]))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[index + half + 1] - sums[index - half]) / (2 * half + 1)


def curve_paths(names: Iterable[str], folder: Path) -> dict[str, Path]:
    """A PNG path of its own for every metric name, whatever characters the name has."""
    paths: dict[str, Path] = {}
    for name in names:
        # Names that differ only in the replaced characters, or in case, would share a file.
        stem = unique = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).lower()
        taken = {path.stem for path in paths.values()}
        number = 2
        while unique in taken:
            unique, number = f"{stem}-{number}", number + 1
        paths[name] = folder / f"{unique}.png"
    return paths
