"""Report of a run: curves as PNG files, and one HTML file that holds everything and needs nothing from outside."""

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from realjax.core.json_text import JsonObject, parse_json
from realjax.dataflow.run import METRICS_FILE
from realjax.record.console import format_value
from realjax.record.curves import (
    MAIN_METRICS,
    TRAIN,
    Series,
    Sheet,
    collect_series,
    curve_paths,
    join_equal,
    metric_rank,
)
from realjax.record.metrics import RECORD_KEYS, read_spread, replace_text
from realjax.record.page import details_html, image_html, make_page, pre_html, table_html

REPORT_FILE = "report.html"
PARTS_FILE = "report.json"  # what the report is made of beside the metrics, so that it can be made again
SECTION_KINDS = ("table", "text", "image")
# Pictures that other parts of a run leave in its directory.
RUN_PICTURES = {"graph.png": "Dataflow graph", "timeline.png": "Timeline of calls"}
MOST_HEADLINES = 12  # numbers that the report begins with
REFRESH_SECONDS = 60  # of the page of a run that goes on


@dataclass(frozen=True, kw_only=True)
class Section:
    """A titled part of the report: a table (`columns`, `rows`), preformatted `text`, or an `image` file."""

    title: str
    kind: str = "table"
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[object, ...], ...] = ()
    text: str = ""
    image: str | Path | None = None
    comes_first: bool = False  # right behind the curves

    def __post_init__(self) -> None:
        if self.kind not in SECTION_KINDS:
            raise ValueError(
                f"report section '{self.title}': kind '{self.kind}'; use one of {', '.join(SECTION_KINDS)}"
            )
        if self.kind == "image" and (self.image is None or not Path(self.image).is_file()):
            raise ValueError(f"report section '{self.title}': no image file at '{self.image}'; give an existing file")


@dataclass(frozen=True, kw_only=True)
class ReportParts:
    """What a report says beside a run's metrics."""

    title: str
    summary: Mapping[str, str]
    sections: Sequence[Section] = ()
    is_finished: bool = True

    def to_json(self) -> str:
        """Returns the text of `report.json`."""
        return json.dumps(asdict(self), default=str, indent=1)

    @classmethod
    def from_json(cls, found: JsonObject) -> "ReportParts":
        """Returns what `to_json` was given; pictures that are gone are left out."""
        sections = [Section(**_as_tuples(one)) for one in found["sections"] if _is_there(one)]
        return cls(**{**found, "sections": sections})


def _is_there(section: JsonObject) -> bool:
    return section["kind"] != "image" or Path(str(section["image"])).is_file()


def _as_tuples(section: JsonObject) -> JsonObject:
    return {**section, "columns": tuple(section["columns"]), "rows": tuple(map(tuple, section["rows"]))}


def write_report(run_dir: str | Path, parts: ReportParts) -> Path:
    """Draws `curves/*.png` and writes `report.html` from what is in `run_dir`; returns the path of the report.

    That of a run that goes on has the main curves alone, and a browser reads it again every minute. A run without
    metrics gets a report that says so; of a very long one the curves have some of the steps. ValueError: an unreadable
    `metrics.jsonl` (names the line).
    """
    run_dir = Path(run_dir)
    metrics_path = run_dir / METRICS_FILE
    records = read_spread(metrics_path) if metrics_path.exists() else []
    charts = collect_series(records)
    body = [f"<h1>{html.escape(parts.title)}</h1>"]
    if not parts.is_finished:
        body.append('<p class="note">The run goes on, and this page with it.</p>')
    body += headline_parts(records)
    main, others = curve_parts(charts, records, run_dir, with_others=parts.is_finished)
    body += main
    body += [section_html(section) for section in parts.sections if section.comes_first]
    body += others
    body += ["<h2>The run</h2>", table_html((), parts.summary.items())]
    body += [section_html(section) for section in parts.sections if not section.comes_first]
    body += [
        section_html(Section(title=heading, kind="image", image=run_dir / name))
        for name, heading in RUN_PICTURES.items()
        if (run_dir / name).is_file()
    ]
    body += last_metrics_parts(records)
    config_path = run_dir / "config.json"
    if config_path.is_file():
        body.append(details_html("Resolved configuration", pre_html(config_path.read_text(encoding="utf-8"))))
    path = run_dir / REPORT_FILE
    replace_text(path, make_page(parts.title, "\n".join(body), None if parts.is_finished else REFRESH_SECONDS))
    # Last: it says whether all of it is there.
    replace_text(run_dir / PARTS_FILE, parts.to_json())
    return path


def read_parts(run_dir: Path) -> ReportParts | None:
    """Returns the parts of a report that was written before; None where there is none. ValueError for a damaged one."""
    path = run_dir / PARTS_FILE
    if not path.is_file():
        return None
    try:
        return ReportParts.from_json(parse_json(path.read_bytes()))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"'{path}' is not as a run writes it ({error}); remove it") from error


def is_finished(run_dir: Path) -> bool:
    """Returns whether the run whose directory this is wrote its last report."""
    parts = read_parts(run_dir)
    return parts is not None and parts.is_finished and (run_dir / REPORT_FILE).exists()


def headline_parts(records: Sequence[JsonObject]) -> list[str]:
    """A table of what matters: the first main metrics, as they were and as they are, in training and held out.

    What moved as one before it did is left out.
    """
    found: dict[tuple[int, bool, str], list[float]] = {}
    for record in records:
        for name, value in record.items():
            if (rank := metric_rank(name)) < len(MAIN_METRICS) and isinstance(value, int | float):
                found.setdefault((rank, record["kind"] != TRAIN, name), []).append(value)
    rows, moved = [], list[list[float]]()
    for (_, is_held_out, name), values in sorted(found.items()):
        if values in moved:
            continue
        moved += [values] if len(set(values)) > 1 else []
        first, last = (format_value(name, value) for value in (values[0], values[-1]))
        place = "held out" if is_held_out else "training"
        rows.append((f"{name}, {place}", first if len(values) > 1 else "", last))
    rows = rows[:MOST_HEADLINES]
    return [table_html(("", "first", "last"), rows, numeric=True)] if rows else []


def curve_parts(
    charts: Mapping[str, Series], records: Sequence[JsonObject], run_dir: Path, *, with_others: bool
) -> tuple[list[str], list[str]]:
    """HTML of the main curves, and that of the others, folded; each is drawn into `curves/`, and none twice.

    Says why when there is none.
    """
    if not charts:
        reason = "Too few steps for a curve yet." if records else "No metrics were recorded."
        return ["<h2>Curves</h2>", f'<p class="note">{reason}</p>'], []
    folder = run_dir / "curves"
    folder.mkdir(exist_ok=True)
    drawn, paths = join_equal(charts), curve_paths(charts, folder)
    main, others, sheet = [], [], Sheet()
    for name, same in drawn.items():
        is_main = metric_rank(name) < len(MAIN_METRICS)
        if not (is_main or with_others):
            continue
        sheet.draw(paths[name], charts[name])
        missing = sum(name in record.get("nonfinite", ()) for record in records)
        notes = [f"Also {', '.join(same)}."] if same else []
        notes += [f"{missing} non-finite value(s) left out."] if missing else []
        note = f'<p class="note">{html.escape(" ".join(notes))}</p>' if notes else ""
        figure = f"<figure><figcaption>{html.escape(name)}</figcaption>{image_html(paths[name], name)}{note}</figure>"
        (main if is_main else others).append(figure)
    shown = [f'<div class="curves">{"".join(main)}</div>'] if main else []
    # Without any main metric the others are all there is to see.
    folded = details_html("Other curves", f'<div class="curves">{"".join(others)}</div>', is_open=not main)
    return ["<h2>Curves</h2>", *shown], [folded] if others else []


def last_metrics_parts(records: Iterable[JsonObject]) -> list[str]:
    """A folded table with one column per kind: the last record of each."""
    last = {record["kind"]: record for record in records}
    if not last:
        return []
    columns = ("metric", *(f"{kind}, step {record['step']}" for kind, record in last.items()))
    names = {name for record in last.values() for name in record if name not in RECORD_KEYS}
    rows = [
        (name, *(cell_text(name, record) for record in last.values()))
        for name in sorted(names, key=lambda name: (metric_rank(name), name))
    ]
    return [details_html("Last metrics", table_html(columns, rows, numeric=True))]


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
