import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.algorithms.kl import KL_COEFFICIENT, adapt_coefficient, estimate_kl, kl_coefficient

RNG = np.random.default_rng(0)
LOGITS, REF_LOGITS = RNG.standard_normal((2, 7)).astype(np.float32)


def log_softmax(x):
    return x - np.log(np.exp(x.astype(np.float64)).sum())


P, Q = log_softmax(LOGITS), log_softmax(REF_LOGITS)
KL = float(np.sum(np.exp(P) * (P - Q)))


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_expectation_is_the_kl(estimator):
    assert np.sum(np.exp(P) * estimate_kl(P, Q, estimator)) == pytest.approx(KL, rel=1e-12)


def test_k2_and_k3_are_never_negative_and_k1_is_the_difference():
    assert np.all(estimate_kl(P, Q, "k2") >= 0) and np.all(estimate_kl(P, Q, "k3") >= 0)
    np.testing.assert_array_equal(estimate_kl(P, Q, "k1"), P - Q)
    np.testing.assert_allclose(estimate_kl(P, Q, "k2"), (P - Q) ** 2 / 2)


def gradient_of_expectation(estimator):
    """Expected gradient with respect to logits when tokens are drawn from the policy and estimates differentiated."""

    def fn(logits):
        logprobs = jax.nn.log_softmax(logits)
        return jnp.sum(jax.lax.stop_gradient(jnp.exp(logprobs)) * estimate_kl(logprobs, Q, estimator))

    return np.asarray(jax.grad(fn)(LOGITS))


def test_only_k2_has_the_gradient_of_the_kl_and_k1_has_none():
    true = jax.grad(lambda x: jnp.sum(jax.nn.softmax(x) * (jax.nn.log_softmax(x) - Q)))(LOGITS)
    np.testing.assert_allclose(gradient_of_expectation("k2"), true, atol=1e-6)
    np.testing.assert_allclose(gradient_of_expectation("k1"), 0, atol=1e-6)
    # k3 is KL(reference || policy) to the policy: its gradient is that of the other direction.
    other = jax.grad(lambda x: -jnp.sum(jnp.exp(Q) * jax.nn.log_softmax(x)))(LOGITS)
    np.testing.assert_allclose(gradient_of_expectation("k3"), other, atol=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_far_apart_models_give_finite_estimates_and_gradients(estimator):
    logprobs = jnp.array([-1000.0, 0.0, -60.0])
    value, grad = jax.value_and_grad(lambda x: estimate_kl(x, jnp.array([0.0, -1000.0, 0.0]), estimator).sum())(
        logprobs
    )
    assert np.isfinite(value) and np.isfinite(grad).all()


def test_controller_moves_towards_the_target_by_a_bounded_step():
    options = {"target": 6.0, "horizon": 10000.0}
    assert adapt_coefficient(0.1, 6.0, 128, **options) == pytest.approx(0.1)
    assert adapt_coefficient(0.1, 6.6, 128, **options) == pytest.approx(0.1 * (1 + 0.1 * 128 / 10000))
    assert adapt_coefficient(0.1, 600.0, 128, **options) == pytest.approx(0.1 * (1 + 0.2 * 128 / 10000))
    assert adapt_coefficient(0.1, -6.0, 128, **options) == pytest.approx(0.1 * (1 - 0.2 * 128 / 10000))
    # More sequences in a step than the horizon has: it stays positive.
    assert adapt_coefficient(0.1, -6.0, 80000, **options) == pytest.approx(0.08)


def test_coefficient_is_the_options_until_the_controller_has_one():
    assert kl_coefficient({}, 0.1) == 0.1
    assert kl_coefficient({KL_COEFFICIENT: 0.3}, 0.1) == 0.3
