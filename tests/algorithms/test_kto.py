"""KTO is a loop over answers in float64, with the KL of the whole batch, however that is packed and split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.algorithms.kto import KL_INPUTS, KTOParameters, estimate_kl_baseline, kto_loss
from realjax.core.metrics import summarize
from realjax.data.packing import PART_LENS
from tests.algorithms.pair_cases import halves, make_pairs
from tests.given.sequences import pack_in_order, unpack_array

VARIANTS = {"default": KTOParameters(), "weighted": KTOParameters(beta=0.3, desirable_weight=1.5)}
PACKINGS = {"short rows": (48, range(8), 12), "long rows": (128, (5, 2, 7, 0, 6, 1, 4, 3), 4)}


def make_cases(shift=0.3, seed=0):
    """Answers with log-probabilities of an actor that has moved from its reference, the second ones up by `shift`."""
    rng = np.random.default_rng(seed)
    cases = []
    for i, pair in enumerate(make_pairs(seed)):
        reference = -rng.exponential(1.5, len(pair["tokens"]))
        actor = reference + rng.normal(0, 0.3, len(reference))
        actor[pair[PART_LENS][0] :] += shift
        logprobs = {"ref_logprobs": reference, "logprobs": actor, "old_logprobs": actor}
        labels = {"pair_weight": np.float32(1), "desirable": np.float32(i % 3 > 0)}
        cases.append(pair | labels | {key: x.astype(np.float32) for key, x in logprobs.items()})
    return cases


def log_ratios(pair, actor):
    """Of both answers."""
    ratios = np.split(actor - pair["ref_logprobs"].astype(np.float64), pair[PART_LENS][:1])
    return [float(x[mask].sum()) for x, mask in zip(ratios, halves(pair, "loss_mask"), strict=True)]


def plain_loss(cases, actors, p, kl):
    losses, scores, hits = [], {0: [], 1: []}, []
    for pair, actor in zip(cases, actors, strict=True):
        ratio, good = log_ratios(pair, actor)[0], int(pair["desirable"])
        h = p.beta * (ratio - kl)
        weight = p.desirable_weight if good else p.undesirable_weight
        losses.append(weight * (1 - 1 / (1 + np.exp(-h if good else h))))
        scores[good].append(p.beta * ratio)
        hits.append((h > 0) == good)
    metrics = {"pos_score": np.mean(scores[1]), "neg_score": np.mean(scores[0]), "acc": np.mean(hits)}
    return np.mean(losses), metrics | {"n_desirable": len(scores[1]), "n_undesirable": len(scores[0])}


def with_baseline(cases, packing="short rows"):
    """The packed batch with the host call's key, and the plan."""
    row_len, order, num_rows = PACKINGS[packing]
    batch, plan = pack_in_order(cases, row_len, order=order, num_rows=num_rows)
    arrays = {key: np.asarray(batch[key]) for key in (*KL_INPUTS, "segment_ids")}
    for key in ("old_logprobs", "ref_logprobs"):
        arrays[key] = np.where(arrays["loss_mask"], arrays[key], np.nan)  # prompts and padding are not looked at
    result = estimate_kl_baseline(arrays, {})
    return batch.with_arrays(**result.arrays), plan, summarize([result.metrics])["kl"]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_gradient_and_metrics_are_those_of_a_loop(packing, variant):
    p, cases = VARIANTS[variant], make_cases()
    actors = [pair["logprobs"].astype(np.float64) for pair in cases]
    expected_kl = np.mean([log_ratios(*pair)[1] for pair in zip(cases, actors, strict=True)])
    batch, plan, kl = with_baseline(cases, packing)
    assert kl == pytest.approx(expected_kl, rel=1e-5) and kl > 0
    assert set(np.unique(batch["kl_baseline"])) == {0, np.float32(kl)}, "0 where there is no pair"

    def mean_loss(logprobs):
        sums = kto_loss({"logprobs": logprobs}, batch, parameters=p)
        return sums.loss.sum / sums.loss.weight, sums

    logprobs = jnp.where(batch["loss_mask"], batch["logprobs"], jnp.nan)
    (loss, sums), grad = jax.value_and_grad(mean_loss, has_aux=True)(logprobs)
    expected, metrics = plain_loss(cases, actors, p, kl)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert summarize([sums.metrics]) == pytest.approx(metrics, rel=1e-4)

    for i, own in enumerate(unpack_array(grad, plan)):
        # All tokens of an answer have one gradient: the KL is a constant, and the other answer has none.
        up, down = (
            plain_loss(cases, actors[:i] + [actors[i] + s / cases[i]["loss_mask"].sum()] + actors[i + 1 :], p, kl)[0]
            for s in (1e-5, -1e-5)
        )
        first = np.arange(len(own)) < cases[i][PART_LENS][0]
        share = (cases[i]["loss_mask"] & first).sum() / cases[i]["loss_mask"].sum()
        slope = (up - down) / 2e-5 / share
        np.testing.assert_allclose(own, slope * (cases[i]["loss_mask"] & first), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_sums_of_micro_batches_are_those_of_the_batch(variant):
    batch, _, _ = with_baseline(make_cases())
    sums_of = lambda rows: kto_loss({"logprobs": jnp.asarray(rows["logprobs"])}, rows, parameters=VARIANTS[variant])
    parts = [sums_of(batch.rows(slice(i, i + 4))) for i in range(0, 12, 4)]
    added = jax.tree.map(lambda *xs: sum(xs), *parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), added, sums_of(batch))


def test_an_actor_that_is_the_reference_starts_at_a_half():
    cases = [pair | dict.fromkeys(("logprobs", "old_logprobs"), pair["ref_logprobs"]) for pair in make_cases()]
    batch, _, kl = with_baseline(cases)
    sums = kto_loss({"logprobs": jnp.asarray(batch["logprobs"])}, batch, parameters=KTOParameters())
    assert kl == 0 and float(sums.loss.sum / sums.loss.weight) == 0.5


def test_an_estimate_below_0_is_0():
    assert with_baseline(make_cases(shift=-1.0))[2] == 0
