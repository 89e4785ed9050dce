import jax
import jax.numpy as jnp
import numpy as np

from realjax.core.loss import LossSums
from realjax.core.metrics import Mean, Total, finalize


def sums_of(values: np.ndarray) -> LossSums:
    total, count = jnp.sum(values), jnp.float32(values.size)
    return LossSums(Mean(total, count), {"mean": Mean(2 * total, count), "count": Total(count)})


def test_parts_of_a_batch_add_up_to_the_whole_however_unequal():
    values = np.random.default_rng(0).random(100).astype(np.float32)
    parts = [sums_of(part) for part in np.split(values, [3, 50, 51])]
    added = jax.tree.map(lambda *xs: sum(xs), *parts)
    whole = finalize(sums_of(values).metrics)
    found = finalize(added.metrics)
    assert found.keys() == whole.keys() == {"mean", "count"}
    np.testing.assert_allclose([found["mean"], found["count"]], [2 * values.mean(), 100], rtol=1e-6)
    np.testing.assert_allclose([found[name] for name in whole], list(whole.values()), rtol=1e-6)


def test_the_mean_of_nothing_is_nan_and_its_total_zero():
    nothing = finalize({"mean": Mean(jnp.zeros(()), jnp.zeros(())), "total": Total(jnp.zeros(()))})
    assert np.isnan(nothing["mean"]) and nothing["total"] == 0
