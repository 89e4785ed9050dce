"""A run whose lengths vary meets few sizes and wastes little; where it stopped it goes on with those it met."""

import numpy as np
import pytest

from realjax.data.packing import pack_rows, rollout_row_len
from realjax.runtime.rollouts import list_targets
from realjax.runtime.sizes import LEAST, MANY_TIMES, Sizes

PROMPT, NEW = 64, 256


def draw(kind: str, rng: np.random.Generator, number: int, progress: float) -> np.ndarray:
    """Returns lengths of answers of which `kind` says how they are spread; `progress` goes from 0 to 1."""
    if kind == "uniform":
        return rng.integers(1, NEW + 1, number)
    if kind == "some end early":
        return np.where(rng.random(number) < 0.1, rng.integers(1, NEW + 1, number), NEW)
    mean = NEW / 3 if kind == "exponential" else NEW * (0.1 + 0.6 * progress)
    return np.minimum(NEW, 1 + rng.exponential(mean, number)).astype(int)


def run(kind: str, num_answers: int, num_parts: int, multiple: int, num_steps: int) -> tuple[list[int], float, float]:
    """Returns the step of each new pair of rows and targets, and the shares of empty places, here and with the least
    rows.
    """
    rng, sizes = np.random.default_rng(1), Sizes().of("train")
    row_len = rollout_row_len(PROMPT + NEW, num_answers // num_parts, multiple)
    met: dict[tuple[int, int], int] = {}
    used, taken, least = 0, 0, 0
    for step in range(num_steps):
        answers = draw(kind, rng, num_answers, step / num_steps)
        lengths = answers + rng.integers(PROMPT // 3, PROMPT + 1, num_answers)
        order = np.argsort(-lengths)
        parts = [order[i::num_parts] for i in range(num_parts)]
        num_rows = sizes.rows([lengths[part].tolist() for part in parts], row_len, multiple)
        for part in parts:
            plan = pack_rows(lengths[part], row_len, num_rows=num_rows, num_shards=multiple)
            asked = max(int(answers[part][list(row)].sum()) for row in plan.rows)
            most = row_len - int((lengths - answers).min())
            met.setdefault((num_rows, min(row_len, sizes.targets(asked, row_len, most))), step)
        used += int(lengths.sum())
        taken += num_rows * num_parts * row_len
        least += LEAST.rows([lengths[part].tolist() for part in parts], row_len, multiple) * num_parts * row_len
    return sorted(met.values()), 1 - used / taken, 1 - used / least


@pytest.mark.parametrize(("num_answers", "num_parts", "multiple"), [(32, 2, 1), (128, 4, 2), (256, 1, 4), (512, 4, 8)])
@pytest.mark.parametrize("kind", ["uniform", "exponential", "some end early"])
def test_lengths_of_one_kind_meet_few_sizes(kind, num_answers, num_parts, multiple):
    """Of thousands of draws. The rows left empty are not many more than the least."""
    steps, share, least = run(kind, num_answers, num_parts, multiple, 200)
    assert len(steps) <= (6 if num_answers < 64 else 2)
    # Those of few answers differ most, and the first 64 steps keep to the first size.
    assert share < least + (0.16 if num_answers < 64 else 0.12)


@pytest.mark.parametrize(("num_answers", "num_parts", "multiple"), [(32, 2, 1), (64, 2, 1), (128, 4, 2), (512, 4, 8)])
@pytest.mark.parametrize("kind", ["uniform", "exponential", "some end early"])
def test_nothing_is_met_after_the_third_step_of_a_short_run(kind, num_answers, num_parts, multiple):
    steps, _, _ = run(kind, num_answers, num_parts, multiple, 30)
    assert steps[-1] < 3


def test_lengths_that_grow_meet_sizes_in_few_steps():
    steps, share, least = run("growing", 256, 1, 4, 400)
    assert len(steps) <= 12
    assert share < least + 0.1


def test_there_is_no_room_for_answers_that_prompts_leave_no_place_for():
    mask, positions = np.arange(128) >= np.array([[64], [70]]), np.tile(np.arange(128), (2, 1))
    assert list_targets(mask, positions, Sizes().of("a")).shape == (2, 64)
    positions[1, 100:] -= 100  # another sequence, of which the first 10 tokens are a prompt
    mask[1, 100:110] = False
    assert list_targets(mask, positions, Sizes().of("b")).shape == (2, 96)
    assert list_targets(mask, positions).shape == (2, 64)


def test_a_size_met_before_is_taken_unless_it_is_far_too_large():
    sizes = Sizes()
    assert sizes.of("a").rows([[8] * 30], 8, 1) == 30
    assert sizes.of("a").rows([[8] * 25], 8, 1) == 30
    assert [sizes.of("a").rows([[8] * 15], 8, 1) for _ in range(MANY_TIMES)] == [30] * (MANY_TIMES - 3) + [15] * 3
    assert sizes.of("b").rows([[8] * 25], 8, 4) == 28
    again = Sizes(sizes.met)
    assert [again.of("a").rows([[8] * n], 8, 1) for n in (14, 25, 40)] == [15, 30, 40]
    assert sizes.met != again.met
