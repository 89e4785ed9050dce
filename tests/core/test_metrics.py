import numpy as np
import pytest

from realjax.core.metrics import (
    EffectiveShare,
    Last,
    Least,
    Mean,
    Most,
    Std,
    Total,
    measure_mean,
    measure_std,
    summarize,
)

VALUES = np.random.default_rng(0).normal(1e4, 0.1, 1000)


def metrics_of(values: np.ndarray) -> dict:
    everything = np.ones(values.shape, bool)
    return {
        "mean": measure_mean(values, everything),
        "std": measure_std(values, everything),
        "least": Least(float(values.min())),
        "most": Most(float(values.max())),
        "total": Total(float(values.size)),
        "last": Last(float(values[-1])),
        "share": EffectiveShare(float(values.sum()), float(np.square(values).sum()), float(values.size)),
    }


@pytest.mark.parametrize("cuts", [[], [500], [1, 2, 999], list(range(1, 1000))], ids=len)
def test_statistics_are_of_the_set_however_it_was_cut(cuts):
    """Also a small spread around a large mean, of which sums of plain squares would leave nothing."""
    found = summarize(metrics_of(part) for part in np.split(VALUES, cuts))
    expected = {"mean": VALUES.mean(), "std": VALUES.std(), "least": VALUES.min(), "most": VALUES.max()}
    share = VALUES.sum() ** 2 / (1000 * np.square(VALUES).sum())
    assert found == pytest.approx(expected | {"total": 1000, "last": VALUES[-1], "share": share}, rel=1e-9)


def test_entries_off_the_mask_are_not_looked_at():
    mask = np.arange(1000) < 10
    values = np.where(mask, VALUES, np.nan)
    found = summarize([{"mean": measure_mean(values, mask), "std": measure_std(values, mask)}])
    assert found == pytest.approx({"mean": VALUES[:10].mean(), "std": VALUES[:10].std()}, rel=1e-9)


def test_parts_of_nothing_add_nothing_and_a_set_of_nothing_has_no_mean():
    nothing = {"mean": Mean(0.0, 0.0), "std": Std(0.0, 0.0, 0.0)}
    assert summarize([nothing, nothing]) == {}
    one = {"mean": Mean(6.0, 2.0), "std": Std(3.0, 8.0, 2.0)}
    for parts in ([one], [nothing, one], [one, nothing]):
        assert summarize(parts) == {"mean": 3, "std": 2}


def test_sums_of_devices_are_added_up_in_more_digits():
    """2^24 ones in float32 stay 2^24 whatever is added to them."""
    parts = [{"n": Total(np.float32(x))} for x in (2**24, *[1] * 10)]
    assert summarize(parts) == {"n": 2**24 + 10}


def test_weights_that_are_all_0_are_worth_no_sample():
    assert summarize([{"share": EffectiveShare(0.0, 0.0, 5.0)}]) == {"share": 0}
    assert summarize([{"share": EffectiveShare(0.0, 0.0, 0.0)}]) == {}
    assert summarize([{"share": EffectiveShare(3.0, 9.0, 3.0)}]) == {"share": pytest.approx(1 / 3)}
