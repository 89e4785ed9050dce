"""Weights of tokens that another policy drew are those of a loop, and 1 where it is the same policy."""

from dataclasses import replace

import numpy as np
import pytest

from realjax.algorithms.corrections import CORRECTION_INPUTS, CorrectionParameters, make_corrections
from realjax.algorithms.grpo import GRPOParameters
from realjax.core.metrics import summarize
from tests.algorithms.rollout_cases import PACKINGS, host_arrays, make_rollouts, poisoned
from tests.given.sequences import unpack_array

VARIANTS = {
    "tis": CorrectionParameters(kind="tis", high=1.1),
    "decoupled": CorrectionParameters(kind="tis", high=None),
    "tis of products": CorrectionParameters(kind="tis", level="sequence", high=1.3),
    "mis": CorrectionParameters(kind="mis", low=0.9, high=1.1),
    "mis of products": CorrectionParameters(kind="mis", level="sequence", low=0.8, high=1.2),
    "mis of means": CorrectionParameters(kind="mis", level="geometric", low=0.97, high=1.03),
    "icepop": CorrectionParameters(kind="mis", low=0.5, high=5.0),
    "rejection": CorrectionParameters(reject_above=0.03),
    "tis and rejection": CorrectionParameters(kind="tis", level="geometric", high=1.01, reject_above=0.04),
}
UNLEARNED = 8  # a sequence that the train mask leaves out


def make_stale(change=1.0):
    """Returns rollouts whose sampler was `change` times as far from the actor as in `rollout_cases`."""
    rollouts = make_rollouts()
    for i, r in enumerate(rollouts):
        r["old_logprobs"] = r["logprobs"] + np.float32(change) * (r["old_logprobs"] - r["logprobs"])
        r["train_mask"] = r["loss_mask"] & (i != UNLEARNED)
    return rollouts


def plain_weights(rollouts, p):
    """Each sequence's weights, which tokens were truncated, and which were left out."""
    results = []
    for r in rollouts:
        tokens = np.flatnonzero(r["train_mask"])
        gaps = [float(r["old_logprobs"][t]) - float(r["logprobs"][t]) for t in tokens]
        weights, cut, left_out = (np.zeros(len(r["tokens"])) for _ in range(3))
        for t, gap in zip(tokens, gaps, strict=True):
            level = {"token": gap, "sequence": sum(gaps), "geometric": sum(gaps) / len(gaps)}[p.level]
            w = 1.0 if p.kind in ("auto", "none") else float(np.exp(level))
            if p.kind == "tis" and p.high is not None and w > p.high:
                w, cut[t] = p.high, 1
            if p.kind == "mis" and not p.low <= w <= p.high:
                left_out[t] = 1
            if p.reject_above is not None and abs(sum(gaps) / len(gaps)) > p.reject_above:
                left_out[t] = 1
            weights[t] = 0 if left_out[t] else w
        results.append((weights, cut, left_out))
    return results


def correct(rollouts, p, packing="short rows"):
    batch, plan = PACKINGS[packing].pack(rollouts)
    arrays = poisoned(host_arrays(batch))
    for key in ("logprobs", "old_logprobs"):
        arrays[key] = np.where(arrays["train_mask"], arrays[key], np.nan).astype(np.float32)
    result = make_corrections(p)({key: arrays[key] for key in (*CORRECTION_INPUTS, "segment_ids")}, {})
    return unpack_array(result.arrays["correction"], plan), result.metrics


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_and_metrics_are_those_of_a_loop(packing, variant):
    p, rollouts = VARIANTS[variant], make_stale()
    found, metrics = correct(rollouts, p, packing)
    expected = plain_weights(rollouts, p)
    for own, (weights, _, _) in zip(found, expected, strict=True):
        np.testing.assert_allclose(own, weights, rtol=1e-5)
    is_trained = np.concatenate([r["train_mask"] for r in rollouts])
    weights, cut, left_out = (np.concatenate(parts)[is_trained] for parts in zip(*expected, strict=True))
    gaps = np.concatenate([r["logprobs"].astype(np.float64) - r["old_logprobs"] for r in rollouts])[is_trained]
    assert summarize([metrics]) == pytest.approx(
        {
            "correction_weight": weights.mean(),
            "correction_ess": weights.sum() ** 2 / (len(weights) * (weights**2).sum()),
            "correction_cut": cut.mean(),
            "correction_left_out": left_out.mean(),
            "sampler_kl": (np.exp(-gaps) - 1 + gaps).mean(),
        },
        rel=1e-5,
    )
    if variant not in ("decoupled", "icepop"):
        assert 0 < cut.mean() + left_out.mean() < 1, "the case has both"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sampler_that_is_the_actor_needs_no_correction(variant):
    rollouts = make_stale(change=0.0)
    found, metrics = correct(rollouts, VARIANTS[variant])
    for own, r in zip(found, rollouts, strict=True):
        np.testing.assert_array_equal(own, r["train_mask"])
    values = {"correction_weight": 1, "correction_ess": 1, "correction_cut": 0, "correction_left_out": 0}
    assert summarize([metrics]) == {**values, "sampler_kl": 0}


@pytest.mark.parametrize("variant", VARIANTS)
def test_metrics_of_two_parts_are_those_of_the_whole(variant):
    p, rollouts = VARIANTS[variant], make_stale()
    learned = lambda keep: [r | {"train_mask": r["train_mask"] & keep(i)} for i, r in enumerate(rollouts)]
    parts = [correct(learned(keep), p)[1] for keep in (lambda i: i < 4, lambda i: i >= 4)]
    assert summarize(parts) == pytest.approx(summarize([correct(rollouts, p)[1]]), rel=1e-9)


def test_ratios_beyond_all_numbers_stay_finite():
    rollouts = make_stale(change=1e5)
    for p in VARIANTS.values():
        found, metrics = correct(rollouts, p)
        assert all(np.isfinite(own).all() for own in found)
        assert all(np.isfinite(value) for name, value in summarize([metrics]).items())


def test_a_correction_without_anything_to_correct_is_refused():
    for correction in (CorrectionParameters(kind="tis"), CorrectionParameters(reject_above=0.1)):
        with pytest.raises(ValueError, match=r"^correction\.(kind|reject_above): found .*; set recompute_logp"):
            GRPOParameters(correction=correction, recompute_logprobs=False)
        p = GRPOParameters(correction=correction)
        assert "correction" in p.actor_inputs
        assert "correction" not in replace(p, correction=CorrectionParameters()).actor_inputs
    with pytest.raises(ValueError, match="low: found 2.5; it must be below high, which is 2.0"):
        CorrectionParameters(kind="mis", low=2.5)
