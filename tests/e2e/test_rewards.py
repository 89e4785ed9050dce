"""A verifier that hangs, raises or has no answer for some rows: the run ends well, and says how many these were."""

import pytest

from tests.given.commands import Trial

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.usefixtures("quick")]
STEPS, PROMPTS, SAMPLES = 4, 8, 2  # 32 prompts, with the numbers 0 to 31


def test_rows_that_cannot_be_scored_cost_only_themselves(given, tmp_path, capfd):
    options = {
        "allocation_mode": "d2p1m1",
        "n_gpus_per_node": 2,
        "reward.fn": "tests.given.rewards:troubled_by_id",
        "reward.workers": 2,
        "reward.timeout_s": 0.5,
        "reward.retries": 0,
        "reward.max_failed_share": 0.9,
        "rew.path": None,
        "rew.init_from_scratch": None,
        "algo.ppo_n_minibatches": 1,
        "group_size": SAMPLES,
    }
    trial = Trial(given=given, root=tmp_path, experiment="grpo", options=options)
    assert trial.run() == 0
    records = trial.metrics("train")
    assert len(records) == STEPS
    # Every fourth prompt, whichever step it is drawn in.
    assert sum(record["reward/failed"] for record in records) == STEPS * PROMPTS * SAMPLES / 4
    for record in records:
        assert record["n_seqs"] == PROMPTS * SAMPLES - record["reward/failed"]
        assert 0 <= record["task_reward"] <= 1 and record["task_reward"] == pytest.approx(record["reward/fn"])
        assert record["time/text_rewards"] > 0 and "nonfinite" not in record
    output = "".join(capfd.readouterr())
    told = [line for line in output.splitlines() if "nothing is learned from it" in line]
    assert len(told) == 1 and "reward.fn tests.given.rewards:troubled_by_id: " in told[0]


def test_a_run_whose_answers_cannot_be_scored_ends_with_the_reason(given, tmp_path, capfd):
    options = {"reward.fn": "tests.given.rewards:troubled_by_id", "reward.max_failed_share": 0.0, "reward.workers": 1}
    options |= {"reward.timeout_s": 0.5, "reward.retries": 0}
    assert Trial(given=given, root=tmp_path, experiment="rloo", options=options).run() == 2
    error = capfd.readouterr().err
    assert "answers could not be scored, and reward.max_failed_share is 0 (reward.fn tests.given.rewards:" in error
