"""Measures of held-out answers are of the set: neither the batch size nor what training carries changes them."""

from functools import cache

import numpy as np
import pytest

from realjax.dataflow.run import RolloutEvaluation
from realjax.runtime.evaluation import evaluate_rollouts
from tests.given.models import quick_compiles
from tests.given.runs import build_rl_spec, load_executor

pytestmark = pytest.mark.slow
SAMPLES, SUCCESS = {"greedy": 1, "sampled": 3}, 0.2


@pytest.fixture(scope="module")
def values_of(given, tmp_path_factory):
    """Returns `values_of(batch size) -> the evaluation's values, and the answers' rewards and lengths by variant`."""
    root = tmp_path_factory.mktemp("rl")

    @cache
    def values(batch_size: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        changes = {"algo__ppo_n_minibatches": 1, "algo__min_new_tokens": 2, "reward__fn_weight": 0.5}
        spec = build_rl_spec(
            given,
            root,
            "grpo",
            dataset__train_bs_n_seqs=batch_size,
            dataset__valid_path=given.held_out,
            reward__fn="tests.given.rewards:shortness",
            eval__num_samples=SAMPLES["sampled"],
            eval__success_above=SUCCESS,
            eval__vote_fn="tests.given.rewards:first_letter",
            **changes,
        )
        (evaluation,) = spec.evaluations.values()
        assert isinstance(evaluation, RolloutEvaluation)
        with quick_compiles():
            executor = load_executor(spec)
            before = {name: dict(state) for name, state in executor.controls.items()}
            found, _ = evaluate_rollouts(executor, evaluation, evaluation.loader, None)
            assert executor.controls == before
            answers = {}
            for variant, calls in evaluation.variants.items():
                batches = [
                    executor.step(evaluation.loader.batch(i), None, calls).batch
                    for i in range(evaluation.loader.total_steps)
                ]
                exist = [np.asarray(b["segment_ids"]).max(axis=1, keepdims=True) for b in batches]
                places = [np.arange(b["rewards"].shape[1]) < n for b, n in zip(batches, exist, strict=True)]
                answers[variant] = np.concatenate(
                    [np.asarray(b["rewards"])[place] for b, place in zip(batches, places, strict=True)]
                )
        return found, answers

    return values


@pytest.mark.parametrize("batch_size", [1, 4, 5])
def test_they_do_not_depend_on_the_batch_size(batch_size, values_of):
    found, expected = values_of(batch_size)[0], values_of(6)[0]
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_they_are_those_of_plain_numpy(values_of):
    found, answers = values_of(4)
    for variant, rewards in answers.items():
        assert len(rewards) == 6 * SAMPLES[variant]
        assert found[f"{variant}/task_reward"] == pytest.approx(rewards.mean(dtype=np.float64), rel=1e-5)
        assert found[f"{variant}/task_reward_std"] == pytest.approx(rewards.std(dtype=np.float64), rel=1e-5)
        assert found[f"{variant}/n_seqs"] == len(rewards)
        assert found[f"{variant}/min_response_len"] <= found[f"{variant}/avg_response_len"]
        assert float(found[f"{variant}/min_response_len"]).is_integer()
    assert found["sampled/min_response_len"] < found["sampled/max_response_len"]


def test_several_answers_are_attempts_to_solve_a_prompt(values_of):
    found, answers = values_of(4)
    assert found["sampled/pass@1"] == pytest.approx((answers["sampled"] > SUCCESS).mean())
    assert 0 < found["sampled/pass@1"] < found["sampled/pass@2"] < found["sampled/pass@3"]
    assert 0 <= found["sampled/majority@3"] <= found["sampled/pass@3"]
    assert not any(name.startswith("greedy/pass") for name in found)
