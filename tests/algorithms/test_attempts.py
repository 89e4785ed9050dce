from itertools import combinations

import numpy as np
import pytest

from realjax.algorithms.attempts import estimate_pass, find_majority, list_sizes, measure_attempts
from realjax.algorithms.groups import Groups
from realjax.core.metrics import summarize

NUM_SAMPLES = 6


@pytest.mark.parametrize("num_solved", range(NUM_SAMPLES + 1))
def test_pass_is_the_share_of_all_choices_of_k_answers_that_hold_a_right_one(num_solved):
    solved = [i < num_solved for i in range(NUM_SAMPLES)]
    for k in range(1, NUM_SAMPLES + 1):
        choices = [any(choice) for choice in combinations(solved, k)]
        assert estimate_pass(NUM_SAMPLES, num_solved, k) == pytest.approx(np.mean(choices), abs=1e-12)


def test_pass_of_many_samples_does_not_overflow():
    assert estimate_pass(10_000, 1, 100) == pytest.approx(0.01)
    assert estimate_pass(10_000, 0, 10_000) == 0 and estimate_pass(10_000, 1, 10_000) == 1


def test_sizes_are_powers_of_two_and_all():
    assert list_sizes(1) == (1,) and list_sizes(6) == (1, 2, 4, 6) and list_sizes(8) == (1, 2, 4, 8)


@pytest.mark.parametrize(
    ("votes", "solved", "expected"),
    [
        ("aab", [1, 1, 0], 1),
        ("abb", [1, 0, 0], 0),
        ("aabb", [1, 1, 0, 0], 0.5),
        ("aabbcc", [1, 1, 0, 0, 0, 0], 1 / 3),
        ("aab", [1, 0, 1], 0.5),  # the same vote, once in a form that does not count
        ([None, None, "a"], [0, 0, 1], 1),
        ([None, None], [0, 1], 0),
    ],
)
def test_majority_is_what_most_answers_say(votes, solved, expected):
    assert find_majority(votes, [bool(x) for x in solved]) == pytest.approx(expected)


def attempts_of(prompts):
    """The metrics of these prompts, one row for two of their sequences, with garbage where there is none."""
    flat = [(p, *sample) for p, samples in prompts for sample in samples]
    rows = [flat[i : i + 2] for i in range(0, len(flat), 2)] + [[]]
    exists = np.array([[True] * len(row) + [False] * (3 - len(row)) for row in rows])
    group, rewards = np.full(exists.shape, 99), np.full(exists.shape, np.nan)
    for row, own in enumerate(rows):
        for column, (prompt, reward, _) in enumerate(own):
            group[row, column], rewards[row, column] = prompt, reward
    votes = [vote for _, _, vote in flat]
    return measure_attempts(rewards > 0.5, Groups.of(group, exists), NUM_SAMPLES, votes)


def test_metrics_are_of_the_set_whatever_the_batches():
    rng = np.random.default_rng(0)
    draw = lambda: [(float(rng.random() > 0.6), int(rng.integers(3))) for _ in range(NUM_SAMPLES)]
    prompts = [(int(p), draw()) for p in range(7)]
    whole = summarize([attempts_of(prompts)])
    assert set(whole) == {"pass@1", "pass@2", "pass@4", "pass@6", "majority@6"}
    for cut in (1, 3, 6):
        assert summarize([attempts_of(prompts[:cut]), attempts_of(prompts[cut:])]) == pytest.approx(whole, rel=1e-12)
    rewards = np.array([[reward for reward, _ in samples] for _, samples in prompts])
    assert whole["pass@1"] == pytest.approx(rewards.mean())
    assert whole["pass@6"] == pytest.approx(rewards.any(axis=1).mean())
    majorities = [find_majority([v for _, v in s], [r > 0.5 for r, _ in s]) for _, s in prompts]
    assert whole["majority@6"] == pytest.approx(np.mean(majorities)) and 0 < whole["majority@6"] < 1
