import numpy as np
import pytest

from realjax.algorithms.value_norm import Statistics, read_statistics, update_statistics

BATCHES = [np.random.default_rng(i).normal(3 * i, 1 + i, 5 + 7 * i) for i in range(4)]


def run(kind, beta=0.99995, eps=1e-5):
    state = {}
    for batch in BATCHES:
        state = update_statistics(state, batch, kind=kind, beta=beta)
    return state, read_statistics(state, kind, eps)


def test_ma_is_the_mean_of_everything():
    everything = np.concatenate(BATCHES)
    _, statistics = run("ma")
    assert statistics.mean == pytest.approx(everything.mean(), rel=1e-12)
    assert statistics.std == pytest.approx(everything.std(), rel=1e-9)


@pytest.mark.parametrize("beta", [0.5, 0.9, 0.99995])
def test_exp_weighs_batches_by_their_age(beta):
    weights = np.array([beta**age for age in reversed(range(len(BATCHES)))])
    weights /= weights.sum()
    mean = sum(w * batch.mean() for w, batch in zip(weights, BATCHES, strict=True))
    square = sum(w * (batch**2).mean() for w, batch in zip(weights, BATCHES, strict=True))
    _, statistics = run("exp", beta)
    assert statistics.mean == pytest.approx(mean, rel=1e-9)
    assert statistics.std == pytest.approx(np.sqrt(square - mean**2), rel=1e-6)


@pytest.mark.parametrize("kind", ["exp", "ma"])
def test_floors(kind):
    assert read_statistics({}, kind, 1e-5) == Statistics(mean=0.0, std=pytest.approx(0.1))
    constant = update_statistics({}, np.full(9, 2.5), kind=kind, beta=0.99)
    found = read_statistics(constant, kind, 1e-5)
    assert (found.mean, found.std) == (pytest.approx(2.5), pytest.approx(0.1))


def test_eps_bounds_the_weight_of_an_exponential_mean():
    state = update_statistics({}, np.full(9, 2.5), kind="exp", beta=0.99995)
    assert state["value_weight"] == pytest.approx(5e-5)
    assert read_statistics(state, "exp", 1e-5).mean == pytest.approx(2.5)
    assert read_statistics(state, "exp", 1e-4).mean == pytest.approx(1.25)


@pytest.mark.parametrize("kind", ["exp", "ma"])
def test_no_returns_change_nothing_and_the_state_is_plain_numbers(kind):
    state, _ = run(kind)
    assert update_statistics(state, np.zeros(0), kind=kind, beta=0.9) == state
    assert update_statistics({}, np.zeros(0), kind=kind, beta=0.9) == {}
    assert all(type(value) is float for value in state.values())


def test_normalising_is_undone_within_five_standard_deviations():
    statistics = Statistics(mean=-2.0, std=0.5)
    values = np.linspace(-4.4, 0.4, 11)
    np.testing.assert_allclose(statistics.denormalise(statistics.normalise(values)), values)
    np.testing.assert_array_equal(statistics.normalise(np.array([-100.0, 100.0])), [-5.0, 5.0])
