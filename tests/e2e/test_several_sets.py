"""Several held-out sets of one run: each is measured as if it were the only one."""

import pytest

from tests.given.commands import Trial

pytestmark = pytest.mark.e2e


def test_each_set_has_the_loss_that_it_has_alone(given, tmp_path):
    options = {"dataset__train_bs_n_seqs": 130, "dataset__valid_bs_n_seqs": 16, "eval_freq_epochs": 1}
    measured = {}
    for name, paths in (("both", f"[some={given.valid},{given.held_out}]"), ("alone", given.valid)):
        trial = Trial(given=given, root=tmp_path, name=name, options={**options, "dataset__valid_path": paths})
        assert trial.run() == 0
        measured[name] = trial.metrics("eval")
    assert len(measured["both"]) == len(measured["alone"]) == 2
    for both, alone in zip(measured["both"], measured["alone"], strict=True):
        for metric in ("loss", "ppl", "n_tokens", "n_seqs"):
            assert both[f"some/{metric}"] == pytest.approx(alone[metric], rel=1e-5)
        assert both["held-out/n_seqs"] == 6 and both["held-out/loss"] != both["some/loss"]
        assert "loss" not in both
