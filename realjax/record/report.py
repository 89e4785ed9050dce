"""Report of a run: curves as PNG files, and one HTML file that holds everything and needs nothing from outside."""

import base64
import html
import mimetypes
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from realjax.core.json_text import JsonObject
from realjax.dataflow.run import METRICS_FILE
from realjax.record.console import format_value
from realjax.record.metrics import RECORD_KEYS, read_spread, replace_text

REPORT_FILE = "report.html"
SECTION_KINDS = ("table", "text", "image")
# Shown first, in this order; a name counts by its last part, so `actor/loss` stands with `loss`.
MAIN_METRICS = (
    *("loss", "ppl", "task_reward", "kl", "importance_weight", "actor_clip_ratio", "actor_loss", "value_loss"),
    *("avg_response_len", "eos_share", "acc", "lr", "grad_norm", "tokens_per_second"),
)
# Pictures that other parts of a run leave in its directory.
RUN_PICTURES = {"graph.png": "Dataflow graph", "timeline.png": "Timeline of calls"}
KIND_COLORS = {"train": "#2563eb", "eval": "#ea580c"}
OTHER_COLORS = ("#059669", "#9333ea", "#475569")
MIN_POINTS_TO_SMOOTH = 50

# {kind: (steps, values)} of one metric, steps ascending.
Series = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class Section:
    """A titled part of the report: a table (`columns`, `rows`), preformatted `text`, or an `image` file."""

    title: str
    kind: str = "table"
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[object, ...], ...] = ()
    text: str = ""
    image: str | Path | None = None

    def __post_init__(self) -> None:
        if self.kind not in SECTION_KINDS:
            raise ValueError(
                f"report section '{self.title}': kind '{self.kind}'; use one of {', '.join(SECTION_KINDS)}"
            )
        if self.kind == "image" and (self.image is None or not Path(self.image).is_file()):
            raise ValueError(f"report section '{self.title}': no image file at '{self.image}'; give an existing file")


def write_report(
    run_dir: str | Path, *, title: str, summary: Mapping[str, str], sections: Sequence[Section] = ()
) -> Path:
    """Draws `curves/*.png` and writes `report.html` from what is in `run_dir`; returns the path of the report.

    A run without metrics gets a report that says so; of a very long one the curves have some of the steps. ValueError:
    an unreadable `metrics.jsonl` (names the line).
    """
    run_dir = Path(run_dir)
    metrics_path = run_dir / METRICS_FILE
    records = read_spread(metrics_path) if metrics_path.exists() else []
    parts = [f"<h1>{html.escape(title)}</h1>", table_html((), summary.items())]
    parts += curve_parts(records, run_dir)
    parts += [section_html(section) for section in sections]
    parts += [
        section_html(Section(title=heading, kind="image", image=run_dir / name))
        for name, heading in RUN_PICTURES.items()
        if (run_dir / name).is_file()
    ]
    parts += last_metrics_parts(records)
    config_path = run_dir / "config.json"
    if config_path.is_file():
        parts.append(details_html("Resolved configuration", pre_html(config_path.read_text(encoding="utf-8"))))
    path = run_dir / REPORT_FILE
    replace_text(path, PAGE.format(title=html.escape(title), style=STYLE, body="\n".join(parts)))
    return path


def collect_series(records: Iterable[JsonObject]) -> dict[str, Series]:
    """Curves per metric name: numeric values of >= 2 steps in some kind, in the order of `MAIN_METRICS`, then by name.

    The last record of a step counts; non-finite values (null in the file) are left out, as are metrics that never
    change: of the many counters of a run few have a curve to look at.
    """
    points: dict[str, dict[str, dict[int, float]]] = {}
    for record in records:
        for name, value in record.items():
            if name not in RECORD_KEYS and isinstance(value, int | float):
                points.setdefault(name, {}).setdefault(record["kind"], {})[record["step"]] = value
    curves = {}
    for name in sorted(points, key=lambda name: (metric_rank(name), name)):
        values = {value for by_step in points[name].values() for value in by_step.values()}
        if max(map(len, points[name].values())) >= 2 and (len(values) > 1 or metric_rank(name) < len(MAIN_METRICS)):
            curves[name] = {
                kind: (np.array(sorted(by_step)), np.array([by_step[step] for step in sorted(by_step)], float))
                for kind, by_step in points[name].items()
            }
    return curves


def metric_rank(name: str) -> int:
    """Place of a metric in the report; all but the main ones share the last."""
    last_part = name.rsplit("/", 1)[-1]
    return MAIN_METRICS.index(last_part) if last_part in MAIN_METRICS else len(MAIN_METRICS)


def draw_curve(path: Path, name: str, series: Series) -> None:
    """Writes one PNG: a line per kind, and for many points a smoothed line over the light raw one."""
    # Margins that are wide enough for every label: to measure them takes as long as to draw, and a run has many curves.
    margins = {"left": 0.17, "right": 0.98, "bottom": 0.14, "top": 0.9}
    figure = Figure(figsize=(6.4, 3.4), dpi=120)
    axes = figure.subplots(gridspec_kw=margins)
    other_colors = iter(OTHER_COLORS * len(series))
    for kind, (steps, values) in sorted(series.items(), key=lambda item: item[0] != "train"):
        color = KIND_COLORS.get(kind) or next(other_colors)
        marker = "o" if len(steps) <= 12 else None
        if len(steps) > MIN_POINTS_TO_SMOOTH:
            axes.plot(steps, values, color=color, alpha=0.25, linewidth=1)
            values = smooth(values, window=max(5, len(values) // 25))
        axes.plot(steps, values, color=color, linewidth=1.8, marker=marker, markersize=4, label=kind)
    # A metric's name is data: a `$` in it must not start a formula.
    axes.set_title(name, fontsize="medium", parse_math=False)
    axes.set_xlabel("global step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    # Ticks show whole values: "+1.2e4" in a corner of the plot is easily missed.
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(series) > 1:
        axes.legend(frameon=False)
    figure.savefig(path)


def smooth(values: np.ndarray, *, window: int) -> np.ndarray:
    """Centred moving mean over up to `window` values, evenly fewer at the ends: a straight line stays one."""
    index = np.arange(len(values))
    half = np.minimum(window // 2, np.minimum(index, index[::-1]))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[index + half + 1] - sums[index - half]) / (2 * half + 1)


def curve_parts(records: Sequence[JsonObject], run_dir: Path) -> list[str]:
    """HTML of all curves, the secondary ones folded, drawing each into `curves/`; says why when there is none."""
    curves = collect_series(records)
    if not curves:
        reason = "Too few steps for a curve yet." if records else "No metrics were recorded."
        return ["<h2>Curves</h2>", f'<p class="note">{reason}</p>']
    folder = run_dir / "curves"
    folder.mkdir(exist_ok=True)
    main, others = [], []
    for name, path in curve_paths(curves, folder).items():
        draw_curve(path, name, curves[name])
        missing = sum(name in record.get("nonfinite", ()) for record in records)
        note = f'<p class="note">{missing} non-finite value(s) left out.</p>' if missing else ""
        figure = f"<figure><figcaption>{html.escape(name)}</figcaption>{image_html(path, name)}{note}</figure>"
        (main if metric_rank(name) < len(MAIN_METRICS) else others).append(figure)
    parts = ["<h2>Curves</h2>"]
    if main:
        parts.append(f'<div class="curves">{"".join(main)}</div>')
    if others:
        # Without any main metric the others are all there is to see.
        parts.append(details_html("Other curves", f'<div class="curves">{"".join(others)}</div>', is_open=not main))
    return parts


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


def last_metrics_parts(records: Iterable[JsonObject]) -> list[str]:
    """A table with one column per kind: the last record of each."""
    last = {record["kind"]: record for record in records}
    if not last:
        return []
    columns = ("metric", *(f"{kind}, step {record['step']}" for kind, record in last.items()))
    names = dict.fromkeys(name for record in last.values() for name in record if name not in RECORD_KEYS)
    rows = [(name, *(cell_text(name, record) for record in last.values())) for name in names]
    return ["<h2>Last metrics</h2>", table_html(columns, rows, numeric=True)]


def cell_text(name: str, record: JsonObject) -> str:
    """A metric of a record as text: empty when the record has no such metric."""
    if name not in record:
        return ""
    return "non-finite" if record[name] is None else format_value(name, record[name])


def section_html(section: Section) -> str:
    """A section with its heading."""
    heading = f"<h2>{html.escape(section.title)}</h2>"
    if section.kind == "table":
        return heading + table_html(section.columns, section.rows)
    if section.kind == "text":
        return heading + pre_html(section.text)
    assert section.image is not None, "Section checks its image"
    return heading + f"<figure>{image_html(Path(section.image), section.title)}</figure>"


def table_html(columns: Sequence[str], rows: Iterable[Iterable[object]], *, numeric: bool = False) -> str:
    """A table; without `columns` the first cell of each row is its heading."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = []
    for row in rows:
        first, *rest = (html.escape(str(cell)) for cell in row)
        first = f"<td>{first}</td>" if columns else f"<th>{first}</th>"
        body.append(f"<tr>{first}{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>")
    kind = ' class="numeric"' if numeric else ""
    return f'<div class="scroll"><table{kind}>{f"<tr>{head}</tr>" if head else ""}{"".join(body)}</table></div>'


def image_html(path: Path, label: str) -> str:
    """The image file itself, as a data URL."""
    mime = mimetypes.guess_type(path.name)[0] or "image/png"
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img src="data:{mime};base64,{data}" alt="{html.escape(label)}">'


def pre_html(text: str) -> str:
    """Text as it is, in a fixed-width box."""
    return f"<pre>{html.escape(text)}</pre>"


def details_html(title: str, body: str, *, is_open: bool = False) -> str:
    """`body`, which is HTML already, folded under `title`."""
    return f"<details{' open' if is_open else ''}><summary>{html.escape(title)}</summary>{body}</details>"


# The policy makes the browser itself refuse anything that is not in this file.
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --text: #111827; --soft: #6b7280; --line: #e5e7eb; --page: #fff; --box: #f9fafb }
@media (prefers-color-scheme: dark) {
  :root { --text: #e5e7eb; --soft: #9ca3af; --line: #374151; --page: #111827; --box: #1f2937 }
}
* { box-sizing: border-box }
body { max-width: 1120px; margin: 0 auto; padding: 24px; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif }
h1 { margin: 0 0 16px; font-size: 26px }
h2 { margin: 32px 0 12px; font-size: 19px }
.note { margin: 4px 0; color: var(--soft) }
.scroll { overflow-x: auto }
table { border-collapse: collapse }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  white-space: pre-wrap; overflow-wrap: anywhere }
th { color: var(--soft); font-weight: 600; overflow-wrap: normal }
.numeric th + th, .numeric td + td { padding: 6px 0 6px 28px; text-align: right; font-variant-numeric: tabular-nums }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 16px }
figure { margin: 0; padding: 12px; border: 1px solid var(--line); border-radius: 8px; background: var(--box) }
figcaption { margin-bottom: 8px; font-weight: 600; overflow-wrap: anywhere }
img { display: block; max-width: 100%; margin: 0 auto; border-radius: 4px; background: #fff }
details { margin: 24px 0 }
summary { cursor: pointer; font-size: 17px; font-weight: 600 }
details > * + * { margin-top: 12px }
pre { overflow-x: auto; padding: 12px; border: 1px solid var(--line); border-radius: 8px; background: var(--box);
  font-size: 13px; white-space: pre-wrap; overflow-wrap: anywhere }
"""
