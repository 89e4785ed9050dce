"""GRPO with dynamic sampling as a command: it learns from full batches, and goes on after a stop as without one."""

import pytest

from tests.given.commands import Trial, stopped_after
from tests.given.compare import find_differing, without_clocks

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("quick")]
STEPS = 4  # 32 prompts, 8 at a time


def test_a_run_that_draws_again_is_continued(given, tmp_path):
    options = {
        "allocation_mode": "d2p1m1",
        "n_gpus_per_node": 2,
        "reward.fn": "tests.given.rewards:oddness",
        "rew.path": None,
        "rew.init_from_scratch": None,
        "algo.kl_ctl": 0.0,
        "algo.drop_uniform_groups": True,
        "algo.max_draws": 12,
        "algo.ppo_n_minibatches": 1,
        "group_size": 2,
        "recover_mode": "auto",
    }
    whole = Trial(given=given, root=tmp_path, name="whole", experiment="grpo", options=options)
    assert whole.run() == 0
    records = whole.metrics("train")
    assert max(record["draws"] for record in records) > 1
    for record in records:
        assert record["uniform_group_share"] == 0 and record["batch_filled"] == 1
        assert record["trained_seqs"] == 16 and record["drawn_prompts"] >= 8
        assert record["drawn_tokens"] >= record["advantages/n_tokens"] > 0
    stopped = Trial(given=given, root=tmp_path, name="stopped", experiment="grpo", options=options)
    with stopped_after(2):
        assert stopped.run() == 143
    assert stopped.run() == 0
    assert without_clocks(stopped.metrics()) == without_clocks(whole.metrics())
    assert not find_differing(stopped.state(STEPS, "actor"), whole.state(STEPS, "actor"))
