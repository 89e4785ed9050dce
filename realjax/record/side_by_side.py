"""Runs side by side on one page: their curves in one chart each, their last numbers, and the options that differ."""

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from realjax.core.json_text import JsonObject, parse_json
from realjax.core.path_names import shorten_paths
from realjax.dataflow.run import METRICS_FILE
from realjax.record.console import format_value
from realjax.record.curves import MAIN_METRICS, Series, Sheet, collect_series, join_equal, metric_rank
from realjax.record.metrics import read_spread, replace_text
from realjax.record.page import details_html, make_page, picture_html, table_html

CONFIG_FILE = "config.json"


def write_comparison(path: Path, run_dirs: Sequence[Path]) -> None:
    """Writes the page of runs by their log directories. ValueError for an unreadable record or configuration."""
    names = shorten_paths(run_dirs)
    charts = {name: collect_series(read_spread(run / METRICS_FILE)) for name, run in zip(names, run_dirs, strict=True)}
    title = " | ".join(names)
    body = [f"<h1>{html.escape(title)}</h1>", *_last_values(charts), *_curves(merge_charts(charts))]
    rows = find_differences({name: read_options(run) for name, run in zip(names, run_dirs, strict=True)})
    body.append("<h2>Options that differ</h2>")
    body.append(table_html(("option", *names), rows) if rows else '<p class="note">None.</p>')
    replace_text(path, make_page(title, "\n".join(body)))


def merge_charts(charts: Mapping[str, Mapping[str, Series]]) -> dict[str, Series]:
    """Returns the runs' charts by metric, a line for each run and kind."""
    names = {name for of_run in charts.values() for name in of_run}
    merged: dict[str, Series] = {}
    for name in sorted(names, key=lambda name: (metric_rank(name), name)):
        merged[name] = {
            f"{run}, {label}" if len(series) > 1 else run: points
            for run, of_run in charts.items()
            for series in (of_run.get(name, {}),)
            for label, points in series.items()
        }
    return merged


def _curves(charts: Mapping[str, Series]) -> list[str]:
    main, others, sheet = [], [], Sheet()
    for name in join_equal(charts):
        picture = io.BytesIO()
        sheet.draw(picture, charts[name])
        caption = f"<figcaption>{html.escape(name)}</figcaption>"
        figure = f"<figure>{caption}{picture_html(picture.getvalue(), name)}</figure>"
        (main if metric_rank(name) < len(MAIN_METRICS) else others).append(figure)
    parts = ["<h2>Curves</h2>", f'<div class="curves">{"".join(main)}</div>'] if main else []
    folded = details_html("Other curves", f'<div class="curves">{"".join(others)}</div>', is_open=not main)
    return [*parts, folded] if others else parts


def _last_values(charts: Mapping[str, Mapping[str, Series]]) -> list[str]:
    """A table of the main metrics' last values, a column for each run; those of a step before its last say so."""
    ends = {
        run: max((int(points[0][-1]) for series in of_run.values() for points in series.values()), default=0)
        for run, of_run in charts.items()
    }
    labels = {
        (metric_rank(name), name, label)
        for of_run in charts.values()
        for name, series in of_run.items()
        for label in series
        if metric_rank(name) < len(MAIN_METRICS)
    }
    rows = []
    for _, name, label in sorted(labels):
        cells = []
        for run, of_run in charts.items():
            points = of_run.get(name, {}).get(label)
            value = "" if points is None else format_value(name, float(points[1][-1]))
            cells.append(value if points is None or points[0][-1] == ends[run] else f"{value} (step {points[0][-1]})")
        rows.append((f"{name}, {label}", *cells))
    head = ("last", *(f"{run}, step {end}" for run, end in ends.items()))
    return [table_html(head, rows, numeric=True)] if rows else []


def read_options(run_dir: Path) -> dict[str, object]:
    """Returns a run's options by dotted name; none where it left no configuration."""
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        return {}
    try:
        return dict(_flatten(parse_json(path.read_bytes()), ""))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"'{path}' is not as a run writes it ({error}); remove it") from error


def _flatten(node: JsonObject, prefix: str) -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for name, value in node.items():
        found += _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return found


def find_differences(options: Mapping[str, Mapping[str, object]]) -> list[tuple[str, ...]]:
    """Returns a row for each option that is not the same in all runs: its name, and its value in each."""
    names = dict.fromkeys(name for of_run in options.values() for name in of_run)
    rows = [(name, *(str(of_run.get(name, "")) for of_run in options.values())) for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]
