"""SimPO and ORPO are loops over pairs in float64, however pairs are packed and split, and so are their gradients."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.algorithms.orpo import ORPOParameters, make_orpo_loss
from realjax.algorithms.simpo import SimPOParameters, make_simpo_loss
from realjax.core.metrics import summarize
from realjax.data.packing import PART_LENS
from tests.algorithms.pair_cases import halves, make_pairs
from tests.given.sequences import pack_in_order, unpack_array

LOSSES = {
    "simpo": make_simpo_loss(SimPOParameters()),
    "simpo, other options": make_simpo_loss(SimPOParameters(beta=0.7, gamma=0.2)),
    "orpo": make_orpo_loss(ORPOParameters()),
    "orpo, other options": make_orpo_loss(ORPOParameters(odds_weight=1.5)),
}
PACKINGS = {"short rows": (48, range(8), 12), "long rows": (128, (5, 2, 7, 0, 6, 1, 4, 3), 4)}


def make_cases(seed=0):
    """Pairs with the actor's log-probabilities, one of them near the end of odds."""
    rng = np.random.default_rng(seed)
    pairs = make_pairs(seed)
    cases = [pair | {"logprobs": -rng.exponential(1.5, len(pair["tokens"])).astype(np.float32)} for pair in pairs]
    cases[3]["logprobs"] = cases[3]["logprobs"] * np.float32(1e-3)
    return cases


def log_sigmoid(x):
    return -np.log1p(np.exp(-x))


def plain_loss(pairs, logprobs, name):
    """The mean over pairs, and metrics."""
    p = LOSSES[name].fn.keywords["parameters"]
    losses, scores, nll = [], [], []
    for pair, of_pair in zip(pairs, logprobs, strict=True):
        parts = np.split(of_pair, pair[PART_LENS][:1])
        means = [np.mean(x[mask]) for x, mask in zip(parts, halves(pair, "loss_mask"), strict=True)]
        if name.startswith("simpo"):
            better, worse = (p.beta * mean for mean in means)
            losses.append(-log_sigmoid(better - worse - p.gamma))
        else:
            better, worse = (np.log(np.exp(mean) / (1 - np.exp(mean))) for mean in means)
            losses.append(-means[0] - p.odds_weight * log_sigmoid(better - worse))
        scores.append((better, worse))
        nll.append(-means[0])
    better, worse = np.array(scores).T
    metrics = {"acc": (better > worse).mean(), "pos_score": better.mean(), "neg_score": worse.mean()}
    metrics |= {"margin": (better - worse).mean(), "n_pairs": len(pairs)}
    if name.startswith("orpo"):
        metrics |= {"nll": np.mean(nll), "odds_loss": -log_sigmoid(better - worse).mean()}
    return np.mean(losses), metrics


@cache
def plain_results(name):
    pairs = make_cases()
    logprobs = [pair["logprobs"].astype(np.float64) for pair in pairs]
    loss, metrics = plain_loss(pairs, logprobs, name)
    grads = [np.zeros(len(x)) for x in logprobs]
    for i, grad in enumerate(grads):
        for t in range(len(grad)):
            nudge = np.zeros(len(grad))
            nudge[t] = 1e-7
            up, down = (
                plain_loss(pairs, logprobs[:i] + [logprobs[i] + s] + logprobs[i + 1 :], name)[0]
                for s in (nudge, -nudge)
            )
            grad[t] = (up - down) / 2e-7
    return loss, grads, metrics


def mean_loss(name, batch, logprobs):
    sums = LOSSES[name].fn({"logprobs": logprobs}, batch)
    return sums.loss.sum / sums.loss.weight, sums


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", LOSSES)
def test_loss_gradient_and_metrics_are_those_of_a_loop(name, packing):
    row_len, order, num_rows = PACKINGS[packing]
    batch, plan = pack_in_order(make_cases(), row_len, order=order, num_rows=num_rows)
    keys = ("tokens", "segment_ids", "positions", "loss_mask", "pair_weight")
    # Prompts and padding are not looked at.
    logprobs = jnp.where(batch["loss_mask"], batch["logprobs"], jnp.nan)
    fn = lambda x: mean_loss(name, batch.select(keys), x)
    (loss, sums), grad = jax.value_and_grad(fn, has_aux=True)(logprobs)
    expected, expected_grads, metrics = plain_results(name)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert summarize([sums.metrics]) == pytest.approx(metrics, rel=2e-4)
    for own, others in zip(unpack_array(grad, plan), expected_grads, strict=True):
        np.testing.assert_allclose(own, others, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_sums_of_micro_batches_are_those_of_the_batch(name):
    batch, _ = pack_in_order(make_cases(), 48, num_rows=12)
    sums_of = lambda rows: mean_loss(name, rows, jnp.asarray(rows["logprobs"]))[1]
    parts = [sums_of(batch.rows(slice(i, i + 4))) for i in range(0, 12, 4)]
    added = jax.tree.map(lambda *xs: sum(xs), *parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), added, sums_of(batch))


def test_odds_of_answers_that_are_certain_have_an_end():
    pairs = [pair | {"logprobs": np.zeros_like(pair["logprobs"])} for pair in make_cases()]
    batch, _ = pack_in_order(pairs, 48)
    fn = lambda x: mean_loss("orpo", batch, x)
    (loss, _), grad = jax.value_and_grad(fn, has_aux=True)(jnp.asarray(batch["logprobs"]))
    assert np.isfinite(float(loss)) and np.isfinite(np.asarray(grad)).all()
