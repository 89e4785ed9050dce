"""KTO from command to metrics: neither layouts nor micro-batches change its KL, or what is learned."""

from pathlib import Path

import pytest

from tests.given.commands import Trial
from tests.given.runs import Given

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("quick")]
LAYOUTS = {
    "one": {},
    "four": {"n_gpus_per_node": 4, "allocation_mode": "d2p1m2", "actor_train__n_mbs": 2},
}


def test_kto_in_two_layouts(given: Given, tmp_path: Path):
    options = {"actor__path": given.actor, "ref__path": given.ref, "actor__optimizer__lr": 0.003}
    options |= {"dataset__valid_path": given.labelled, "eval_freq_epochs": 1, "total_train_epochs": 2}
    runs = []
    for name, layout in LAYOUTS.items():
        trial = Trial(given=given, root=tmp_path, name=name, experiment="kto", options=options | layout)
        assert trial.run() == 0
        runs.append(trial)
    names = ("loss", "kl", "pos_score", "neg_score", "acc")
    steps, others = ([[record.get(key) for key in names] for record in run.metrics("train")] for run in runs)
    assert len(steps) == 4 and max(kl for _, kl, *_ in steps) > 0
    for ours, theirs in zip(steps, others, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-4)
    first, *_, last = (record["loss"] for record in runs[0].metrics("eval"))
    assert last < first
