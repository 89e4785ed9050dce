"""What is refused of environments before a run begins, and what their reward is."""

import numpy as np
import pytest

from realjax.dataflow.graph import Generate
from realjax.experiments.environment import measure_turns, reward_source
from tests.given.environments import write_chat_models
from tests.given.runs import build_rl_spec


@pytest.fixture(scope="module")
def models(given, tmp_path_factory):
    return {
        **write_chat_models(given, tmp_path_factory.mktemp("chat")),
        "rew.path": None,
        "rew.init_from_scratch": None,
    }


CHATTY = {"env.path": "tests.given.environments:Chatty", "env.max_seqlen": 64}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env.max_seqlen": 8}, r"^env.max_seqlen: found 8 with gen.max_new_tokens=8"),
        ({"env.max_seqlen": 20}, "the first row begins with .* tokens"),
        ({"env.max_seqlen": 999}, "^env.max_seqlen: found 999, .* has 128 positions; lower it to 128"),
        ({"env.path": "tests.given.environments:Nobody"}, "names nothing"),
        (
            {"env.path": "realjax.environments.guessing:GuessingGame"},
            "reset of the first row raised ValueError: found the",
        ),
    ],
)
def test_what_cannot_be_is_one_error(given, models, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        build_rl_spec(given, tmp_path, "grpo", **models, **CHATTY | changes)


def test_a_tokenizer_without_a_template_is_refused(given, tmp_path):
    with pytest.raises(ValueError, match="has no chat template"):
        build_rl_spec(given, tmp_path, "grpo", **CHATTY)


def test_a_run_is_described_with_its_turns(given, models, tmp_path):
    spec = build_rl_spec(given, tmp_path, "grpo", **models, **CHATTY, dataset__valid_path=given.held_out)
    answers = [call for call in spec.mfcs if isinstance(call, Generate)]
    assert len(answers) == 3 and all(call.turns is not None and call.max_seqlen == 64 for call in answers)
    assert len({id(call.turns.rows) for call in answers}) == 2  # each set has its own
    assert "turn_rewards" in spec.graph.calls[[call.name for call in spec.graph.calls].index("advantages")].inputs


def test_rewards_are_sums_over_turns_and_measures_leave_failed_rows_out():
    arrays = {
        "segment_ids": np.array([[1, 1, 1, 2, 2, 0]]),
        "loss_mask": np.array([[0, 1, 1, 0, 1, 0]], bool),
        "turn_rewards": np.array([[0, 0.5, 2, 0, 7, 9]], np.float32),
        "has_eos": np.array([[1, 0, 0]], bool),
        "env_failed": np.array([[0, 1, 0]], bool),
        "num_turns": np.array([[2, 1, 5]]),
        "num_retries": np.array([[0, 1, 8]]),
    }
    assert reward_source().fn(arrays, {}).arrays["rewards"].tolist() == [[2.5, 7, 0]]
    metrics = {name: metric.value for name, metric in measure_turns().fn(arrays, {}).metrics.items()}
    assert metrics == {"turns": 2, "max_turns": 2, "cut_off": 0, "retries": 1, "environment_failed": 1}
