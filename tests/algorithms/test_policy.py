"""The policy loss is that of a loop over tokens, however these are packed and split, and so is its gradient."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.algorithms.corrections import CorrectionParameters
from realjax.algorithms.grpo import GRPOParameters, make_advantages
from realjax.algorithms.policy import PolicyParameters, make_policy_loss, policy_loss
from realjax.core.batch import Batch
from realjax.core.draw import Draw
from realjax.core.metrics import finalize
from realjax.dataflow.graph import Minibatches
from realjax.runtime.rollouts import make_minibatches
from tests.algorithms.rollout_cases import CUT_OFF, LENGTHS, PACKINGS, Packing, host_arrays, make_rollouts
from tests.given.sequences import unpack_array

CORRECTION = CorrectionParameters(kind="mis")  # the weights are random ones
VARIANTS = {
    "ReaL": PolicyParameters(),
    "sequence": PolicyParameters(loss_aggregation="sequence", kl_in="loss", kl_estimator="k3"),
    "constant": PolicyParameters(loss_aggregation="constant", max_response_len=16, kl_in="loss", kl_estimator="k2"),
    "clip-higher": PolicyParameters(eps_clip=0.1, eps_clip_high=0.4, dual_clip=1.3),
    "entropy": PolicyParameters(entropy_coef=0.02, kl_in="loss", kl_estimator="k1", recompute_logprobs=True),
    "reinforce": PolicyParameters(surrogate="reinforce", loss_aggregation="sequence"),
    "gspo": PolicyParameters(surrogate="gspo", loss_aggregation="sequence", eps_clip=0.05, eps_clip_high=0.1),
    "gspo token": PolicyParameters(surrogate="gspo_token", eps_clip=0.05, dual_clip=1.1),
    "cispo": PolicyParameters(surrogate="cispo", eps_clip=0.2, eps_clip_high=0.3, entropy_coef=0.01),
    "corrected": PolicyParameters(
        correction=CORRECTION, recompute_logprobs=True, kl_in="loss", kl_estimator="k3", entropy_coef=0.02
    ),
    "corrected gspo": PolicyParameters(
        correction=CORRECTION, recompute_logprobs=True, surrogate="gspo", loss_aggregation="sequence", eps_clip=0.05
    ),
    "corrected reinforce": PolicyParameters(
        correction=CORRECTION,
        recompute_logprobs=True,
        surrogate="reinforce",
        loss_aggregation="constant",
        max_response_len=16,
    ),
}
# What the actor says is packed as the batch is, under keys that the loss does not read.
NEW, ENTROPY = "values", "scores"
SKIPPED = 4  # a sequence that the train mask leaves out
NUM_LEARNED = sum(response > 0 for _, response in LENGTHS) - 1


def make_cases(seed=0, change=0.35):
    """Returns rollouts with advantages and a train mask, and an actor that has moved since."""
    rng = np.random.default_rng(seed + 100)
    rollouts = make_rollouts(seed)
    for i, r in enumerate(rollouts):
        normal = lambda r=r: rng.standard_normal(len(r["tokens"])).astype(np.float32)
        mask = r["loss_mask"] & (i != SKIPPED)
        r |= {
            "train_mask": mask,
            "advantages": normal(),
            "seq_share": np.float32(mask.any() * len(LENGTHS) / NUM_LEARNED),
            NEW: r["logprobs"] + change * normal(),
            ENTROPY: np.abs(normal()),
            "correction": (np.exp(normal()) * (normal() > -0.5)).astype(np.float32),  # some tokens are left out
        }
    return rollouts


def plain_log_ratio(gaps, gaps_before, t, surrogate):
    """The log-ratio of token t, where constants are those of the point at which the gradient is taken."""
    if surrogate == "gspo":
        return np.mean(list(gaps.values()))
    if surrogate == "gspo_token":
        return np.mean(list(gaps_before.values())) + gaps[t] - gaps_before[t]
    return gaps[t]


def plain_loss(rollouts, news, entropies, p, before=None):
    """The loss of all sequences in float64, and metrics. Constants of the gradient are those of `before`, or `news`."""
    sums, lens, num_kept = [], [], 0
    count = {"low": 0, "high": 0, "dual": 0, "ratio": 0.0, "gap": 0.0, "kl": 0.0, "k3": 0.0}
    low, high = 1 - p.eps_clip, 1 + (p.eps_clip if p.eps_clip_high is None else p.eps_clip_high)
    is_cispo = p.surrogate == "cispo"
    for r, new, old_new, entropy in zip(rollouts, news, before or news, entropies, strict=True):
        weight = r["correction"].astype(np.float64) if p.correction.is_on else np.ones(len(new))
        kept = [t for t in np.flatnonzero(r["train_mask"]) if weight[t] > 0]
        gaps, gaps_before = ({t: x[t] - float(r[p.old_logprobs][t]) for t in kept} for x in (new, old_new))
        total = 0.0
        for t in kept:
            a, gap = float(r["advantages"][t]), gaps[t]
            ratio = np.exp(plain_log_ratio(gaps, gaps_before, t, p.surrogate))
            loss = max(-a * ratio, -a * min(max(ratio, low), high))
            if a < 0 and p.dual_clip is not None:
                count["dual"] += loss > -a * p.dual_clip
                loss = min(loss, -a * p.dual_clip)
            if p.surrogate == "reinforce":
                loss = -a * new[t]
            if is_cispo:
                loss = -min(max(np.exp(gaps_before[t]), low), high) * a * new[t]
            loss *= weight[t]
            d = new[t] - float(r["ref_logprobs"][t])
            kl = {"k1": d, "k2": d * d / 2, "k3": np.exp(-d) - 1 + d}[p.kl_estimator]
            if p.kl_in == "loss":
                loss += p.kl_ctl * kl
            total += loss - p.entropy_coef * entropy[t]
            count["low"] += (is_cispo or a < 0) and ratio < low
            count["high"] += (is_cispo or a > 0) and ratio > high
            count["ratio"] += ratio
            count["gap"] += gap
            count["kl"] += kl
            count["k3"] += np.exp(gap) - 1 - gap
        sums.append(total)
        lens.append(int(r["train_mask"].sum()))
        num_kept += len(kept)
    means = {name: value / num_kept for name, value in count.items()} | {"tokens": num_kept}
    if p.loss_aggregation == "sequence":
        return np.mean([s / max(n, 1) for s, n in zip(sums, lens, strict=True)]), means
    if p.loss_aggregation == "constant":
        return sum(sums) / (len(rollouts) * p.max_response_len), means
    return sum(sums) / sum(lens), means


def mean_loss(p, batch):
    def fn(outputs):
        sums = policy_loss(outputs, batch, parameters=p)
        return sums.loss.sum / sums.loss.weight, sums

    return fn


def outputs_of(batch):
    return {"logprobs": jnp.asarray(batch[NEW]), "entropy": jnp.asarray(batch[ENTROPY])}


@cache
def plain_results(variant):
    """The loss, the gradient of each sequence's log-probabilities by differences, and metrics."""
    p, rollouts = VARIANTS[variant], make_cases()
    news = [r[NEW].astype(np.float64) for r in rollouts]
    entropies = [r[ENTROPY].astype(np.float64) for r in rollouts]
    loss, means = plain_loss(rollouts, news, entropies, p)
    grads = [np.zeros(len(new)) for new in news]
    for i, grad in enumerate(grads):
        for t in range(len(grad)):
            nudge = np.zeros(len(grad))
            nudge[t] = 1e-6
            up, down = (
                plain_loss(rollouts, news[:i] + [news[i] + s] + news[i + 1 :], entropies, p, news)[0]
                for s in (nudge, -nudge)
            )
            grad[t] = (up - down) / 2e-6
    return loss, grads, means


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_gradient_and_metrics_are_those_of_a_loop(packing, variant):
    p, rollouts = VARIANTS[variant], make_cases()
    batch, plan = PACKINGS[packing].pack(rollouts)
    (loss, sums), grads = jax.value_and_grad(mean_loss(p, batch), has_aux=True)(outputs_of(batch))
    expected, expected_grads, means = plain_results(variant)
    assert float(loss) == pytest.approx(expected, rel=2e-5, abs=1e-6)
    for own, others in zip(unpack_array(grads["logprobs"], plan), expected_grads, strict=True):
        np.testing.assert_allclose(own, others, rtol=0, atol=1e-6)
    assert np.asarray(grads["entropy"]).any() == (p.entropy_coef > 0)

    found = {name: float(value) for name, value in finalize(sums.metrics).items()}
    names = {"importance_weight": "ratio", "ppo_approx_kl": "gap", "approx_kl": "k3"}
    if p.surrogate != "reinforce":
        names |= {"clip_ratio_low": "low", "clip_ratio_high": "high"}
        assert found["actor_clip_ratio"] == pytest.approx(means["low"] + means["high"], rel=1e-5)
    if p.dual_clip is not None:
        names |= {"dual_clip_ratio": "dual"}
        assert means["dual"] > 0
    if p.has_kl_loss:
        names |= {"kl_loss": "kl"}
    assert {name: found[name] for name in names} == pytest.approx({n: means[k] for n, k in names.items()}, abs=1e-5)
    assert found["n_tokens"] == means["tokens"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_sums_of_micro_batches_are_those_of_the_batch(variant):
    p = VARIANTS[variant]
    batch, _ = PACKINGS["short rows"].pack(make_cases())
    sums_of = lambda rows: policy_loss(outputs_of(rows), rows, parameters=p)
    parts = [sums_of(batch.rows(slice(i, i + 3))) for i in range(0, batch.num_rows, 3)]
    added = jax.tree.map(lambda *xs: sum(xs), *parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), added, sums_of(batch))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
def test_nothing_off_the_train_mask_counts(variant, garbage):
    p = VARIANTS[variant]
    batch, _ = PACKINGS["two rows"].pack(make_cases())
    mask = np.asarray(batch["train_mask"])
    spoil = lambda x: np.where(mask, x, garbage).astype(np.float32)
    keys = ("advantages", "logprobs", "old_logprobs", "ref_logprobs", "correction")
    spoiled = Batch(arrays=dict(batch.arrays) | {key: spoil(batch[key]) for key in keys})
    run = lambda rows, outputs: jax.value_and_grad(mean_loss(p, rows), has_aux=True)(outputs)
    expected = run(batch, outputs_of(batch))
    found = run(spoiled, {key: jnp.asarray(spoil(x)) for key, x in outputs_of(batch).items()})
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert not np.asarray(found[1]["logprobs"])[~mask].any()


@pytest.mark.parametrize("variant", [name for name, p in VARIANTS.items() if not p.recompute_logprobs])
def test_an_unchanged_actor_has_ratio_1_and_clips_nothing(variant):
    p = VARIANTS[variant]
    batch, _ = PACKINGS["short rows"].pack(make_cases(change=0.0))
    sums = policy_loss(outputs_of(batch), batch, parameters=p)
    found = {name: float(value) for name, value in finalize(sums.metrics).items()}
    zeros = ("ppo_approx_kl", "approx_kl", "actor_clip_ratio", "clip_ratio_low", "clip_ratio_high", "dual_clip_ratio")
    assert found["importance_weight"] == 1
    assert not any(found.get(name, 0) for name in zeros)


def test_at_the_old_policy_the_clipped_gradient_is_the_plain_policy_gradient():
    batch, _ = PACKINGS["short rows"].pack(make_cases(change=0.0))
    gradient = lambda p: jax.grad(mean_loss(p, batch), has_aux=True)(outputs_of(batch))[0]["logprobs"]
    np.testing.assert_allclose(
        gradient(PolicyParameters()), gradient(PolicyParameters(surrogate="reinforce")), atol=1e-7
    )


def test_far_gone_ratios_stay_finite():
    rollouts = [r | {NEW: r["logprobs"] + np.float32(200)} for r in make_cases()]
    batch, _ = PACKINGS["short rows"].pack(rollouts)
    result = jax.value_and_grad(mean_loss(PolicyParameters(kl_in="loss", kl_estimator="k3"), batch), has_aux=True)(
        outputs_of(batch)
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result))


def test_a_batch_without_anything_to_learn_has_loss_and_gradient_0():
    rollouts = [r | {"train_mask": np.zeros_like(r["train_mask"])} for r in make_cases()]
    batch, _ = PACKINGS["short rows"].pack(rollouts)
    for p in VARIANTS.values():
        summed = lambda outputs, p=p: policy_loss(outputs, batch, parameters=p).loss.sum
        loss, grads = jax.value_and_grad(summed)(outputs_of(batch))
        assert float(loss) == 0 and not any(np.asarray(g).any() for g in grads.values())


def test_updates_are_skipped_above_either_limit():
    assert make_policy_loss(PolicyParameters(early_stop_imp_ratio=None)).skip_fn is None
    skip_fn = make_policy_loss(PolicyParameters(early_stop_kl=0.1)).skip_fn
    assert skip_fn is not None
    skips = lambda ratio, kl: bool(skip_fn({"importance_weight": jnp.float32(ratio), "approx_kl": jnp.float32(kl)}))
    assert not skips(4.9, 0.09) and skips(5.1, 0.0) and skips(1.0, 0.11)
    # Nothing to learn from gives means over no token.
    assert not skips(np.nan, np.nan)


def test_the_loss_asks_for_what_it_reads():
    draw = Draw(temperature=0.7)
    assert make_policy_loss(PolicyParameters(), draw).draw == draw
    assert make_policy_loss(PolicyParameters(entropy_coef=0.1)).needs_entropy
    assert not make_policy_loss(PolicyParameters()).needs_entropy
    with pytest.raises(ValueError, match="max_response_len: found null; loss_aggregation=constant"):
        make_policy_loss(PolicyParameters(loss_aggregation="constant"))


def test_long_responses_weigh_as_much_as_short_ones_only_by_sequence():
    """Twice the length, twice the loss by `constant`; the same by `sequence`."""
    lengths = [response for _, response in LENGTHS]
    ones = lambda r: {"advantages": np.ones_like(r["advantages"]), "seq_share": np.float32(r["loss_mask"].any())}
    rollouts = [r | ones(r) | {"train_mask": r["loss_mask"]} for r in make_cases(change=0)]
    batch, _ = PACKINGS["short rows"].pack(rollouts)  # one of them empty, which is counted nowhere here
    loss = lambda **options: float(mean_loss(PolicyParameters(**options), batch)(outputs_of(batch))[0])
    assert loss(loss_aggregation="sequence") == pytest.approx(-1)
    mean_len = np.mean([n for n in lengths if n])
    assert loss(loss_aggregation="constant", max_response_len=16) == pytest.approx(-mean_len / 16, rel=1e-6)


@pytest.mark.parametrize("num_updates", [1, 2])
@pytest.mark.parametrize("aggregation", ["sequence", "constant"])
def test_leaving_sequences_out_changes_nothing_for_the_others(aggregation, num_updates):
    """A token's gradient, in all updates of a step, is that of a loop over the whole group, where some add nothing.

    GRPO (arXiv:2402.03300 eq. 3) divides by the samples drawn. With an even number of both, updates share them alike.
    """
    p = GRPOParameters(mask_truncated=True, loss_aggregation=aggregation, max_response_len=16, kl_ctl=0)
    rollouts = [r | {"has_eos": np.array(i not in CUT_OFF[:2])} for i, r in enumerate(make_rollouts())]
    # An empty response would be no sequence to deal to an update.
    rollouts = [r for r in rollouts if r["loss_mask"].any()] + [rollouts[0] | {"group": np.int32(9)}]
    batch, plan = Packing(order=tuple(range(len(rollouts)))).pack(rollouts)
    result = make_advantages(p)(host_arrays(batch), {})
    # Where a token was before it was dealt to an update, in a key that the loss does not read.
    places = np.arange(batch["tokens"].size).reshape(batch["tokens"].shape)
    batch = batch.with_arrays(**result.arrays, returns=places)
    keys = (*p.actor_inputs, "segment_ids", "positions", "returns")
    found = np.zeros(batch["tokens"].size)
    parts = make_minibatches(batch.select(keys), Minibatches(count=num_updates), row_multiple=1, seed=(0,))
    assert len(parts) == num_updates
    for part in parts:
        logprobs = jnp.asarray(part["logprobs"])  # of an actor that has not moved: a ratio of 1, nothing clipped
        grads = jax.grad(lambda x, part=part: mean_loss(p, part)({"logprobs": x})[0])(logprobs)
        mask = np.asarray(part["train_mask"])
        found[np.asarray(part["returns"])[mask]] = np.asarray(grads)[mask]

    expected = np.zeros(found.size)
    advantages, places = unpack_array(result.arrays["advantages"], plan), unpack_array(batch["returns"], plan)
    for i, r in enumerate(rollouts):
        if not r["has_eos"]:
            continue
        length = int(r["loss_mask"].sum()) if aggregation == "sequence" else 16
        for t in np.flatnonzero(r["loss_mask"]):
            expected[places[i][t]] = -float(advantages[i][t]) / length / (len(rollouts) / num_updates)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)
