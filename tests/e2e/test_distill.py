"""Distillation from command to metrics: own answers and the data's, in two layouts, measured on held-out data."""

from pathlib import Path

import pytest

from tests.given.commands import Trial
from tests.given.runs import Given

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.usefixtures("quick")]
LAYOUTS = {
    "one": {},
    "four": {"n_gpus_per_node": 4, "allocation_mode": "d2p1m2", "actor_train__n_mbs": 2, "teacher_inf__n_mbs": 2},
}


def test_distillation_in_two_layouts(given: Given, tmp_path: Path):
    options = {
        "actor__path": given.actor,
        "teacher__path": given.ref,
        "actor__optimizer__lr": 0.001,
        "total_train_epochs": 2,
        "dataset__path": given.prompts,
        "dataset__valid_path": given.valid,
        "dataset__max_prompt_len": 24,
        "dataset__train_bs_n_seqs": 8,
        "distill__data_share": 0.5,
        "distill__top_k": 16,
        "eval_freq_epochs": 1,
    }
    runs = []
    for name, layout in LAYOUTS.items():
        trial = Trial(given=given, root=tmp_path, name=name, experiment="distill", options=options | layout)
        assert trial.run() == 0
        runs.append(trial)
    names = ("loss", "nll", "teacher_rest", "actor_train/n_tokens", "eos_share")
    first, others = ([[record.get(key) for key in names] for record in run.metrics("train")][0] for run in runs)
    assert first == pytest.approx(others, rel=2e-3, abs=1e-4)
    before, after = ([record["loss"] for record in run.metrics("eval")] for run in runs)
    assert before == pytest.approx(after, rel=2e-2) and before[-1] < 0.8 * before[0]
