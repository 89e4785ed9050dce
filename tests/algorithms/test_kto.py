"""KTO is a loop over answers in float64, with the KL of the whole batch, however that is packed and split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.algorithms.kto import KL_INPUTS, KTOParameters, estimate_kl_baseline, estimate_kl_baselines, kto_loss
from realjax.core.metrics import summarize
from realjax.data.packing import PART_LENS
from realjax.dataflow.graph import Minibatches
from realjax.runtime.rollouts import make_minibatches
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
        labels = {"desirable": np.array([i % 3 > 0, 0], np.float32), "is_other": np.array([False, True])}
        pair = {key: pair[key] for key in ("tokens", "loss_mask", PART_LENS)}
        cases.append(pair | labels | {key: x.astype(np.float32) for key, x in logprobs.items()})
    return cases


def log_ratios(pair, actor):
    """Of both answers."""
    ratios = np.split(actor - pair["ref_logprobs"].astype(np.float64), pair[PART_LENS][:1])
    return [float(x[mask].sum()) for x, mask in zip(ratios, halves(pair, "loss_mask"), strict=True)]


def plain_loss(cases, actors, p, kl):
    losses, scores, hits = [], {0: [], 1: []}, []
    for pair, actor in zip(cases, actors, strict=True):
        ratio, good = log_ratios(pair, actor)[0], int(pair["desirable"][0])
        h = p.beta * (ratio - kl)
        weight = p.desirable_weight if good else p.undesirable_weight
        losses.append(weight * (1 - 1 / (1 + np.exp(-h if good else h))))
        scores[good].append(p.beta * ratio)
        hits.append((h > 0) == good)
    metrics = {"pos_score": np.mean(scores[1]), "neg_score": np.mean(scores[0]), "acc": np.mean(hits)}
    return np.mean(losses), metrics | {"n_desirable": len(scores[1]), "n_undesirable": len(scores[0])}


def read(batch):
    """What the host call reads: prompts and padding are not looked at."""
    arrays = {key: np.asarray(batch[key]) for key in (*KL_INPUTS, "segment_ids")}
    for key in ("old_logprobs", "ref_logprobs"):
        arrays[key] = np.where(arrays["loss_mask"], arrays[key], np.nan)
    return arrays


def with_baseline(cases, packing="short rows"):
    """The packed batch with the host call's keys, and the plan."""
    row_len, order, num_rows = PACKINGS[packing]
    batch, plan = pack_in_order(cases, row_len, order=order, num_rows=num_rows)
    result = estimate_kl_baseline(read(batch), {})
    return batch.with_arrays(**result.arrays), plan, summarize([result.metrics])["kl"]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_gradient_and_metrics_are_those_of_a_loop(packing, variant):
    p, cases = VARIANTS[variant], make_cases()
    actors = [pair["logprobs"].astype(np.float64) for pair in cases]
    expected_kl = np.mean([log_ratios(*pair)[1] for pair in zip(cases, actors, strict=True)])
    batch, plan, kl = with_baseline(cases, packing)
    assert kl == pytest.approx(expected_kl, rel=1e-5) and kl > 0

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


def loss_of(batch, variant="default"):
    return kto_loss({"logprobs": jnp.asarray(batch["logprobs"])}, batch, parameters=VARIANTS[variant])


def assert_same(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_sums_of_micro_batches_are_those_of_the_batch(variant):
    batch, _, _ = with_baseline(make_cases())
    parts = [loss_of(batch.rows(slice(i, i + 4)), variant) for i in range(0, 12, 4)]
    assert_same(jax.tree.map(lambda *xs: sum(xs), *parts), loss_of(batch, variant))


def test_an_update_needs_none_of_the_other_answers():
    batch, _, _ = with_baseline(make_cases(), "long rows")
    (alone,) = make_minibatches(batch, Minibatches(shuffle=False), row_multiple=1, seed=(0,))
    assert alone.num_tokens == sum(int(pair[PART_LENS][0]) for pair in make_cases())
    assert_same(loss_of(alone), loss_of(batch))


def test_the_kl_of_a_set_does_not_depend_on_its_batches():
    cases = make_cases()
    whole = estimate_kl_baselines([read(with_baseline(cases)[0])])
    parts = estimate_kl_baselines([read(pack_in_order(part, 128, num_rows=4)[0]) for part in (cases[:3], cases[3:])])
    values = {float(one.arrays["kl_baseline"].max()) for one in (*whole, *parts)}
    assert max(values) == pytest.approx(min(values), rel=1e-6) and min(values) > 0
    halves_alone = [estimate_kl_baselines([read(pack_in_order(part, 128)[0])])[0] for part in (cases[:3], cases[3:])]
    first, second = (float(one.arrays["kl_baseline"].max()) for one in halves_alone)
    assert first != pytest.approx(second, rel=1e-2)


def test_an_actor_that_is_the_reference_starts_at_a_half():
    cases = [pair | dict.fromkeys(("logprobs", "old_logprobs"), pair["ref_logprobs"]) for pair in make_cases()]
    batch, _, kl = with_baseline(cases)
    sums = loss_of(batch)
    assert kl == 0 and float(sums.loss.sum / sums.loss.weight) == 0.5


def test_an_estimate_below_0_is_0():
    assert with_baseline(make_cases(shift=-1.0))[2] == 0
