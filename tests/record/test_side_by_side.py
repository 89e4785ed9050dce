"""Runs side by side: one chart a metric, the options that differ, and the commands that make the pages."""

import json
from pathlib import Path

import pytest

from realjax.apps import quickstart
from realjax.record.curves import collect_series
from realjax.record.metrics import MetricsWriter
from realjax.record.side_by_side import find_differences, merge_charts


def write_run(folder: Path, scale: float) -> Path:
    with MetricsWriter(folder) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": scale * step, "grad_norm": 1.0 / step})
        writer.write(3, {"loss": 2 * scale}, kind="eval")
    config = {"seed": 1, "optimizer": {"lr": scale}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [write_run(tmp_path / "logs" / name, scale) for name, scale in (("base", 1.0), ("hot", 10.0))]


def test_a_chart_has_a_line_for_each_run_and_kind():
    records = [{"step": step, "kind": "train", "time": 0.0, "loss": float(step)} for step in (1, 2)]
    held_out = [{"step": step, "kind": "eval", "time": 0.0, "loss": 5.0 - step} for step in (1, 2)]
    charts = {"a": collect_series([*records, *held_out]), "b": collect_series(records)}
    assert list(merge_charts(charts)["loss"]) == ["a, train", "a, eval", "b"]


def test_options_that_differ_are_told_and_others_are_not():
    options = {"a": {"seed": 1, "lr": 0.1}, "b": {"seed": 1, "lr": 0.2, "beta": 0.5}}
    assert find_differences(options) == [("lr", "0.1", "0.2"), ("beta", "", "0.5")]


def test_the_page_of_runs(runs, tmp_path, capsys):
    page = tmp_path / "both.html"
    assert quickstart.main(["compare", *map(str, runs), f"output={page}"]) == 0
    assert f"written to {page}" in capsys.readouterr().out
    text = page.read_text()
    assert "<h1>base | hot</h1>" in text and "optimizer.lr" in text and "<td>seed</td>" not in text
    assert "base, step 3" in text and "<td>3.0000</td>" in text and "<td>30.0000</td>" in text
    assert text.count("<figure>") == 2 and 'src="http' not in text


def test_a_report_is_made_of_what_is_there(runs, capsys):
    (runs[0] / "report.html").unlink(missing_ok=True)
    assert quickstart.main(["report", str(runs[0])]) == 0
    assert str(runs[0] / "report.html") in capsys.readouterr().out
    assert "loss, held out" in (runs[0] / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["report", "nowhere"], "report: 'nowhere' holds no metrics.jsonl; give the log directory of a run"),
        (["compare", "{run}"], "compare: found 1 run; give the log directories of two or more"),
    ],
)
def test_what_is_no_run_is_refused(words, expected, runs, capsys):
    assert quickstart.main([word.format(run=runs[0]) for word in words]) == 2
    assert expected in capsys.readouterr().err
