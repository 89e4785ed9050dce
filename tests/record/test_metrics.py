import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from realjax.dataflow.run import METRICS_FILE
from realjax.record.metrics import MetricsWriter, drop_later_steps, read_metrics


def write_steps(run_dir, steps, resume_step=0, **options):
    with MetricsWriter(run_dir, resume_step=resume_step, **options) as writer:
        for step in steps:
            writer.write(step, {"loss": 1 / step})
    return run_dir / METRICS_FILE


def test_every_write_is_one_complete_json_line_at_once(tmp_path):
    path = tmp_path / METRICS_FILE
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 4):
            writer.write(step, {"loss": np.float32(0.5), "num_tokens": np.int64(7), "attention": "dense"}, kind="eval")
            lines = path.read_text().splitlines()
            assert len(lines) == step  # readable before close: what is written survives a kill
            record = json.loads(lines[-1])
            assert record.pop("time") > 1e9
            assert record == {"step": step, "kind": "eval", "loss": 0.5, "num_tokens": 7, "attention": "dense"}
            assert isinstance(record["num_tokens"], int)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_non_finite_values_leave_strict_json(tmp_path, value):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": value, "lr": 0.1})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads((tmp_path / METRICS_FILE).read_text(), parse_constant=refuse)
    assert record["loss"] is None
    assert record["lr"] == 0.1
    assert record["nonfinite"] == ["loss"]


@pytest.mark.parametrize("resume_step", [1, 3, 5, 8])
def test_a_resumed_run_has_each_step_once(tmp_path, resume_step):
    write_steps(tmp_path, range(1, 9))
    path = write_steps(tmp_path, range(resume_step + 1, 11), resume_step=resume_step)
    records = read_metrics(path)
    assert [record["step"] for record in records] == list(range(1, 11))
    assert [record["loss"] for record in records] == [1 / step for step in range(1, 11)]
    assert not path.with_name(METRICS_FILE + ".tmp").exists()


def test_a_last_line_torn_anywhere_is_left_out_and_resumed_over(tmp_path):
    path = write_steps(tmp_path, range(1, 4))
    whole = path.read_bytes()
    last_start = whole.rstrip(b"\n").rfind(b"\n") + 1
    for end in range(last_start, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert [record["step"] for record in read_metrics(path)] == [1, 2]
        drop_later_steps(path, 3)
        assert path.read_bytes() == whole[:last_start]
    # Only the line's end is missing: the record is complete, and the next one must start on a line of its own.
    path.write_bytes(whole[:-1])
    drop_later_steps(path, 3)
    assert path.read_bytes() == whole


def test_a_bad_line_elsewhere_is_an_error_with_its_number(tmp_path):
    path = write_steps(tmp_path, range(1, 4))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:-5], lines[2]]))
    with pytest.raises(ValueError, match=r"metrics\.jsonl' line 2: malformed JSON"):
        read_metrics(path)


def test_starting_anew_keeps_the_earlier_files(tmp_path):
    first = write_steps(tmp_path, [1]).read_bytes()
    second = write_steps(tmp_path, [1, 2]).read_bytes()
    path = write_steps(tmp_path, [1, 2, 3])
    assert len(read_metrics(path)) == 3
    assert (tmp_path / "metrics.1.jsonl").read_bytes() == first
    assert (tmp_path / "metrics.2.jsonl").read_bytes() == second


def test_tensorboard_events_hold_the_tags_and_survive_a_restart(tmp_path):
    write_steps(tmp_path, [1, 2])
    before = {path.name: path.read_bytes() for path in (tmp_path / "tensorboard").iterdir()}
    assert any(b"train/loss" in content for content in before.values())
    write_steps(tmp_path, [2, 3], resume_step=1)
    after = {path.name: path.read_bytes() for path in (tmp_path / "tensorboard").iterdir()}
    assert len(after) == len(before) + 1
    assert before.items() <= after.items()


def test_a_metric_may_not_hide_the_record_keys(tmp_path):
    with MetricsWriter(tmp_path) as writer, pytest.raises(ValueError, match=r"names \['step'\] are taken"):
        writer.write(1, {"step": 2})


def test_wandb_options_are_checked_first(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # makes the import fail, as where it is not installed
    with pytest.raises(ValueError, match=r"wandb_mode: 'online' needs the package wandb.*realjax\[wandb\]"):
        MetricsWriter(tmp_path / "run", wandb_mode="online")
    with pytest.raises(ValueError, match="wandb_mode: 'on' is not a mode; use one of disabled, offline, online"):
        MetricsWriter(tmp_path / "run", wandb_mode="on")
    assert not (tmp_path / "run").exists()


def test_wandb_gets_the_metrics_and_a_resume_the_same_run(tmp_path, monkeypatch):
    inits, logged, finished = [], [], []
    run = SimpleNamespace(define_metric=lambda *_, **__: None, log=logged.append, finish=lambda: finished.append(1))
    fake = SimpleNamespace(init=lambda **options: inits.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for resume_step in (0, 1, 0):
        write_steps(tmp_path, [resume_step + 1], resume_step=resume_step, wandb_mode="offline", wandb_project="p")
    assert logged[1] == {"step": 2, "train/loss": 0.5}
    assert inits[0]["mode"] == "offline"
    assert inits[0]["project"] == "p" and inits[0]["group"] == tmp_path.parent.name
    assert inits[0]["id"] == inits[1]["id"] != inits[2]["id"]
    assert len(finished) == 3
