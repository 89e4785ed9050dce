"""Runs whose layouts a search has found."""

import json

import pytest

from realjax.allocation import settle
from realjax.allocation.choice import PLAN_FILE
from tests.given.commands import Trial, stopped_after

OPEN = {"allocation_mode": "search", "n_gpus_per_node": 2, "dataset.train_bs_n_seqs": 130}


@pytest.mark.e2e
def test_a_searched_run_learns_what_another_does_and_keeps_its_plan(given, tmp_path, monkeypatch):
    options = {**OPEN, "total_train_epochs": 2, "recover_mode": "auto"}
    other = Trial(
        given=given, root=tmp_path, name="one", options={"dataset.train_bs_n_seqs": 130, "total_train_epochs": 2}
    )
    assert other.run() == 0
    trial = Trial(given=given, root=tmp_path, options=options)
    with stopped_after(2):
        assert trial.run() == 143
    plan = (trial.folder("logs") / PLAN_FILE).read_text()
    monkeypatch.setattr(settle, "compare", None)  # it would fail
    assert trial.run(planner__seed=7) == 0
    assert (trial.folder("logs") / PLAN_FILE).read_text() == plan
    found, expected = ([line["loss"] for line in run.metrics("train")] for run in (trial, other))
    assert found == pytest.approx(expected, rel=2e-5)


@pytest.mark.e2e
@pytest.mark.parametrize("experiment", ["ppo", "dpo"])
def test_other_experiments_search_too(given, tmp_path, experiment):
    options = {"allocation_mode": "search", "n_gpus_per_node": 8, "benchmark_steps": 1}
    trial = Trial(given=given, root=tmp_path, experiment=experiment, options=options)
    assert trial.run() == 0
    calls = json.loads((trial.folder("logs") / PLAN_FILE).read_text())["calls"]
    assert all(call["devices"] for call in calls.values()) and len(calls) == {"ppo": 6, "dpo": 2}[experiment]
