import base64
import io
import math
from html.parser import HTMLParser

import numpy as np
import pytest

from realjax.record.curves import Sheet, collect_series, curve_paths, join_equal, smooth
from realjax.record.metrics import MetricsWriter
from realjax.record.report import ReportParts, Section, headline_parts, is_finished, read_parts, write_report

PNG_START = b"\x89PNG\r\n"
EVIL = "<script>alert('x')</script> & \"$\\frac{1}$\""
VOID_TAGS = {"meta", "img"}


class Page(HTMLParser):
    """Reads a page back: texts, images and links; refuses tags that do not nest."""

    def __init__(self, html):
        super().__init__()
        self.open_tags, self.tags, self.links, self.text = [], [], [], ""
        self.feed(html)
        assert self.open_tags == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in VOID_TAGS:
            self.open_tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def run_dir(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 61):
            bad = math.nan if step == 7 else 1.0 / step
            writer.write(step, {EVIL: bad, "zeta": -step, "lr": 1e-5, "loss": 1 / step, "epoch": 1, "backend": "dense"})
            if step % 30 == 0:
                writer.write(step, {"loss": 2 / step, "ppl": 3.0}, kind="eval")
    return tmp_path


def read_page(path):
    return Page(path.read_text(encoding="utf-8"))


def test_report_is_one_file_with_every_curve_embedded(run_dir):
    path = write_report(run_dir, ReportParts(title="A run", summary={"steps": "60"}))
    page = read_page(path)
    pngs = {png.name: png.read_bytes() for png in (run_dir / "curves").iterdir()}
    assert {"loss.png", "ppl.png", "lr.png", "zeta.png"} < set(pngs)
    assert len(pngs) == 5  # and the evil name; no curve for the string, nor for the epoch, which never changes
    assert all(png.startswith(PNG_START) for png in pngs.values())
    embedded = [base64.b64decode(link.removeprefix("data:image/png;base64,")) for link in page.links]
    assert sorted(embedded) == sorted(pngs.values())
    assert all(link.startswith("data:") for link in page.links)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "url(" not in path.read_text()
    assert "@import" not in path.read_text()


def test_all_text_is_escaped_and_shown(run_dir):
    (run_dir / "config.json").write_text(EVIL + "config")
    sections = [
        Section(title=EVIL + "heading", columns=(EVIL + "column",), rows=((EVIL + "cell",),)),
        Section(title="t", kind="text", text=EVIL + "text\n  indented"),
    ]
    summary = {EVIL + "key": EVIL + "value"}
    page = read_page(write_report(run_dir, ReportParts(title=EVIL + "title", summary=summary, sections=sections)))
    assert "script" not in page.tags
    for place in ("title", "key", "value", "heading", "column", "cell", "text\n  indented", "config"):
        assert EVIL + place in page.text
    assert "1 non-finite value(s) left out" in page.text


def test_main_metrics_come_first_and_the_last_values_are_shown(run_dir):
    html = write_report(run_dir, ReportParts(title="A run", summary={})).read_text()
    places = [html.index(f"<figcaption>{name}<") for name in ("loss", "ppl", "lr", "zeta")]
    assert places == sorted(places)
    assert places[2] < html.index("<details><summary>Other curves") < places[3]
    text = Page(html).text
    assert "train, step 60" in text
    assert "eval, step 60" in text
    assert "0.01667" in text  # train loss of the last step
    assert "0.03333" in text


def test_pictures_of_the_run_are_taken_in(run_dir):
    picture = PNG_START + b"a graph"
    (run_dir / "graph.png").write_bytes(picture)
    (run_dir / "sample.svg").write_bytes(b"<svg/>")
    section = Section(title="Sample", kind="image", image=run_dir / "sample.svg")
    page = read_page(write_report(run_dir, ReportParts(title="A run", summary={}, sections=[section])))
    assert "data:image/png;base64," + base64.b64encode(picture).decode() in page.links
    assert "data:image/svg+xml;base64," + base64.b64encode(b"<svg/>").decode() in page.links
    assert "Dataflow graph" in page.text
    assert "Timeline" not in page.text


def test_a_run_without_metrics_says_so(tmp_path):
    page = read_page(write_report(tmp_path, ReportParts(title="Empty", summary={"state": "stopped"})))
    assert "No metrics were recorded." in page.text
    assert "img" not in page.tags
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
    assert (
        "Too few steps for a curve yet." in read_page(write_report(tmp_path, ReportParts(title="One", summary={}))).text
    )


def test_series_hold_each_step_once_in_order():
    records = [{"step": s, "kind": "train", "time": 0.0, "loss": v} for s, v in ((2, 9.0), (1, 4.0), (2, 5.0))]
    records.append({"step": 3, "kind": "train", "time": 0.0, "loss": None, "nonfinite": ["loss"]})
    steps, values = collect_series(records)["loss"]["train"]
    assert steps.tolist() == [1, 2]
    assert values.tolist() == [4.0, 5.0]


def test_every_metric_name_gets_a_file_of_its_own(tmp_path):
    names = ["a/b", "a-b", "A/b", "a b", "a-b-2", "../../up", "$", "é"]
    paths = curve_paths(names, tmp_path)
    assert len({str(path).lower() for path in paths.values()}) == len(names)
    assert all(path.parent == tmp_path for path in paths.values())


@pytest.mark.parametrize("window", [5, 8, 33])
def test_smoothing_keeps_lines_and_calms_noise(window):
    line = np.linspace(3.0, -2.0, 60)
    np.testing.assert_allclose(smooth(line, window=window), line, atol=1e-12)
    noise = np.random.default_rng(0).normal(size=2000)
    middle = smooth(noise, window=window)[window:-window]
    assert middle.std() < 1.5 / math.sqrt(window)


def test_a_chart_shows_nothing_of_the_one_before_on_its_sheet():
    steps = np.arange(1, 61)
    few, many = (
        {"train": (steps[:3], np.array([3.0, 1.0, 2.0]))},
        {"train": (steps, 1e4 / steps), "eval": (steps, -steps)},
    )
    used, pictures = Sheet(), {}
    for name, series in (("few", few), ("many", many), ("few", few), ("many", many)):
        used.draw(found := io.BytesIO(), series)
        Sheet().draw(alone := io.BytesIO(), series)
        assert found.getvalue() == alone.getvalue()
        pictures[name] = found.getvalue()
    assert pictures["few"] != pictures["many"]


def test_sections_are_checked_when_made(tmp_path):
    with pytest.raises(ValueError, match="section 'x': kind 'video'; use one of table, text, image"):
        Section(title="x", kind="video")
    with pytest.raises(ValueError, match=r"section 'x': no image file at '.*absent\.png'"):
        Section(title="x", kind="image", image=tmp_path / "absent.png")


def test_evaluations_stand_in_the_chart_of_what_they_measure():
    records = [
        {"step": step, "kind": kind, "time": 0.0, **{f"{prefix}{name}": step * scale for name in ("kl", "reward/fn")}}
        for step in (1, 2)
        for kind, prefix, scale in (("train", "", 1.0), ("eval", "greedy/", 2.0), ("eval", "hard/sampled/", 3.0))
    ]
    records += [{"step": step, "kind": "eval", "time": 0.0, "greedy/pass@4": step / 4} for step in (1, 2)]
    charts = collect_series(records)
    assert list(charts) == ["kl", "greedy/pass@4", "reward/fn"]
    for name in ("kl", "reward/fn"):
        assert {label: values.tolist() for label, (_, values) in charts[name].items()} == {
            "train": [1.0, 2.0],
            "eval greedy": [2.0, 4.0],
            "eval hard/sampled": [3.0, 6.0],
        }
    assert list(charts["greedy/pass@4"]) == ["eval"]
    assert join_equal(charts) == {"kl": ("reward/fn",), "greedy/pass@4": ()}  # what is equal is drawn once


def test_a_report_is_made_again_from_what_it_left_and_says_whether_the_run_goes_on(run_dir):
    section = Section(title="Answers", columns=("prompt",), rows=(("why?",),), comes_first=True)
    running = ReportParts(title="A run", summary={"steps": "60"}, sections=[section], is_finished=False)
    text = write_report(run_dir, running).read_text()
    assert 'http-equiv="refresh"' in text and "Other curves" not in text and not is_finished(run_dir)
    done = ReportParts(title="A run", summary={"steps": "60"}, sections=[section])
    first = write_report(run_dir, done).read_bytes()
    assert b"refresh" not in first and is_finished(run_dir)
    parts = read_parts(run_dir)
    assert parts is not None and write_report(run_dir, parts).read_bytes() == first
    page = read_page(run_dir / "report.html")
    assert page.text.index("loss, training") < page.text.index("Curves") < page.text.index("why?")
    assert page.text.index("why?") < page.text.index("The run")
    (run_dir / "report.json").write_text("{}")
    with pytest.raises(ValueError, match=r"report\.json' is not as a run writes it .*; remove it"):
        read_parts(run_dir)


def test_the_numbers_that_come_first_have_none_twice():
    steps = [{"step": i, "kind": "train", "loss": i / 8, "actor_loss": i / 8, "eos_share": 1, "acc": 1} for i in (1, 2)]
    (table,) = headline_parts(steps)
    assert [name in table for name in ("loss, training", "actor_loss", "eos_share", "acc, training")] == [1, 0, 1, 1]
