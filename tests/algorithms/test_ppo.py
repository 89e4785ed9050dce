"""PPO's advantages and critic loss are those of loops over sequences, however these are packed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.algorithms.kl import KL_COEFFICIENT
from realjax.algorithms.ppo import CRITIC_INPUTS, PPOParameters, critic_loss, make_advantages, make_critic_loss
from realjax.core.batch import Batch
from realjax.core.metrics import finalize, summarize
from tests.algorithms.rollout_cases import LENGTHS, PACKINGS, make_rollouts, run_host_call
from tests.algorithms.test_returns import plain_gae
from tests.given.sequences import unpack_array

VARIANTS = {
    "ReaL": PPOParameters(),
    "discounted": PPOParameters(discount=0.9, gae_lambda=0.8, adv_norm=False, max_reward_clip=2.0),
    "plain values": PPOParameters(value_norm=False, kl_estimator="k3"),
    "ma": PPOParameters(value_norm_type="ma", kl_ctl=0.0),
    "penalty": PPOParameters(missing_eos_penalty=1.5, value_norm=False, adv_norm=False),
    "recomputed": PPOParameters(recompute_logprobs=True, use_adaptive_kl_ctl=True, kl_estimator="k2"),
}
STATE = {"value_mean": 0.02, "value_mean_square": 0.11, "value_weight": 0.04}


def plain_ppo(rollouts, state, p):
    """Advantages, returns and values before actions, sequence by sequence."""
    mean, std = 0.0, 1.0
    if p.value_norm:
        weight = 1.0 if p.value_norm_type == "ma" else max(state.get("value_weight", 0), p.value_norm_eps)
        mean = state.get("value_mean", 0) / weight
        std = max(state.get("value_mean_square", 0) / weight - mean**2, 1e-2) ** 0.5
    pieces = []
    for (prompt_len, response_len), r in zip(LENGTHS, rollouts, strict=True):
        old = r["old_logprobs" if p.recompute_logprobs else "logprobs"][prompt_len:].astype(np.float64)
        d = old - r["ref_logprobs"][prompt_len:]
        kl = {"k1": d, "k2": d**2 / 2, "k3": np.exp(-d) - 1 + d}[p.kl_estimator]
        rewards = -p.kl_ctl * kl
        score = min(max(float(r["rewards"]), -p.max_reward_clip), p.max_reward_clip)
        if response_len and r["has_eos"]:
            rewards[-1] += score
        elif response_len and p.missing_eos_penalty is not None:
            rewards[-1] += score - p.missing_eos_penalty
        values = r["values"][prompt_len - 1 :].astype(np.float64) * std + mean
        goes_on = not r["has_eos"] and p.missing_eos_penalty is None
        pieces.append((*plain_gae(rewards, values, goes_on, p.discount, p.gae_lambda), values[:-1]))
    advantages, returns, values = zip(*pieces, strict=True)
    return advantages, returns, values


def normalised(returns, state, p):
    """Targets in units of the statistics that have seen these returns, and the statistics."""
    x = np.concatenate(returns)
    if p.value_norm_type == "ma":
        n = state.get("value_weight", 0)
        weight, one = n + len(x), 1.0
        mean = (n * state.get("value_mean", 0) + x.sum()) / weight
        square = (n * state.get("value_mean_square", 0) + (x**2).sum()) / weight
    else:
        old = [state.get(name, 0) for name in ("value_mean", "value_mean_square", "value_weight")]
        b = p.value_norm_beta
        mean, square, weight = (
            b * o + (1 - b) * new for o, new in zip(old, (x.mean(), (x**2).mean(), 1.0), strict=True)
        )
        one = max(weight, p.value_norm_eps)
    std = max(square / one - (mean / one) ** 2, 1e-2) ** 0.5
    after = {"value_mean": mean, "value_mean_square": square, "value_weight": weight}
    return [np.clip((r - mean / one) / std, -5, 5) for r in returns], after


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("state", [{}, STATE], ids=["first step", "later"])
def test_advantages_and_targets_are_those_of_a_loop(packing, variant, state):
    p, rollouts = VARIANTS[variant], make_rollouts()
    found, result = run_host_call(make_advantages(p), rollouts, state, packing=packing)
    assert set(found) == set(p.ADVANTAGE_OUTPUTS)
    advantages, returns, values = plain_ppo(rollouts, state, p)
    flat = np.concatenate(advantages)
    targets, after = normalised(returns, state, p) if p.value_norm else (returns, {})
    for i, (prompt_len, response_len) in enumerate(LENGTHS):
        is_response = np.arange(prompt_len + response_len) >= prompt_len
        expected = (advantages[i] - flat.mean()) / (flat.std() + 1e-5) if p.adv_norm else advantages[i]
        np.testing.assert_allclose(found["advantages"][i][is_response], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found["returns"][i][is_response], targets[i], rtol=1e-4, atol=1e-5)
        before = rollouts[i]["values"][prompt_len - 1 : -1] if response_len else np.zeros(0)
        np.testing.assert_array_equal(found["old_values"][i][is_response], before)
        np.testing.assert_array_equal(found["train_mask"][i], is_response)
        for name in ("advantages", "returns", "old_values"):
            assert found[name][i].dtype == np.float32 and not found[name][i][~is_response].any()
    statistics = {key: value for key, value in result.state.items() if key != KL_COEFFICIENT}
    assert statistics == pytest.approx(after, rel=1e-9)
    assert (KL_COEFFICIENT in result.state) == p.use_adaptive_kl_ctl
    flat_returns, flat_values = np.concatenate(returns), np.concatenate(values)
    explained = 1 - np.var(flat_returns - flat_values) / np.var(flat_returns)
    expected = {"advantage": flat.mean(), "advantage_std": flat.std(), "returns": flat_returns.mean()}
    expected |= {"values": flat_values.mean(), "explained_variance": explained, "returns_std": flat_returns.std()}
    metrics = summarize([result.metrics])
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_off_the_responses_is_looked_at(variant):
    fn, rollouts = make_advantages(VARIANTS[variant]), make_rollouts()
    with_nan, first = run_host_call(fn, rollouts, STATE)
    for garbage in (3e38, np.inf, 0.0):
        other, second = run_host_call(fn, rollouts, STATE, garbage=garbage)
        jax.tree.map(np.testing.assert_array_equal, with_nan, other)
        assert (first.state, first.metrics) == (second.state, second.metrics)


def test_a_batch_in_which_nothing_ends_has_no_score_but_runs():
    rollouts = make_rollouts(ends=False)
    p = PPOParameters(value_norm=False, adv_norm=False, kl_ctl=0.0)
    found, result = run_host_call(make_advantages(p), rollouts)
    for (prompt_len, response_len), returns, rollout in zip(LENGTHS, found["returns"], rollouts, strict=True):
        np.testing.assert_allclose(returns[prompt_len:], [rollout["values"][-1]] * response_len, rtol=1e-5)
    assert summarize([result.metrics])["eos_share"] == 0


def test_a_batch_of_empty_responses_runs():
    rollouts = [r | {"loss_mask": np.zeros_like(r["loss_mask"]), "has_eos": np.array(False)} for r in make_rollouts()]
    found, result = run_host_call(make_advantages(PPOParameters()), rollouts, STATE)
    assert not any(mask.any() for mask in found["train_mask"])
    assert {key: result.state[key] for key in STATE} == STATE
    metrics = summarize([result.metrics])
    assert np.isfinite(list(metrics.values())).all() and not {"kl", "advantage"} & set(metrics)


def critic_batch(packing, seed=0):
    """A batch as the host call leaves it, the critic's new outputs, and where everything went."""
    rng = np.random.default_rng(seed)
    rollouts = make_rollouts(seed)
    found, _ = run_host_call(make_advantages(PPOParameters()), rollouts)
    for i, rollout in enumerate(rollouts):
        n = len(rollout["tokens"])
        rollout |= {name: found[name][i] for name in ("returns", "old_values", "train_mask")}
        rollout["scores"] = rollout["values"] + (0.3 * rng.standard_normal(n)).astype(np.float32)
    batch, plan = PACKINGS[packing].pack(rollouts)
    kept = batch.select((*CRITIC_INPUTS, "segment_ids"))
    return kept, np.asarray(batch["scores"]), plan, rollouts


def plain_critic(rollouts, new, eps):
    total = clipped = 0.0
    for (prompt_len, response_len), r, values in zip(LENGTHS, rollouts, new, strict=True):
        for t in range(prompt_len, prompt_len + response_len):
            value, old, target = float(values[t - 1]), float(r["old_values"][t]), float(r["returns"][t])
            near = old + min(max(value - old, -eps), eps)
            total += max((value - target) ** 2, (near - target) ** 2) / 2
            clipped += (near - target) ** 2 > (value - target) ** 2
    n = sum(response for _, response in LENGTHS)
    return total / n, clipped / n


@pytest.mark.parametrize("packing", PACKINGS)
def test_critic_loss_and_gradient_are_those_of_a_loop(packing):
    p = PPOParameters(value_eps_clip=0.15)
    batch, new, plan, rollouts = critic_batch(packing)

    def mean_loss(values):
        sums = critic_loss({"values": values}, batch, parameters=p)
        return sums.loss.sum / sums.loss.weight, sums

    (loss, sums), grad = jax.value_and_grad(mean_loss, has_aux=True)(jnp.asarray(new))
    values = [x.astype(np.float64) for x in unpack_array(new, plan)]
    expected, clip_ratio = plain_critic(rollouts, values, 0.15)
    assert 0 < clip_ratio < 1
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    metrics = finalize(sums.metrics)
    assert float(metrics["value_loss"]) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["value_clip_ratio"]) == pytest.approx(clip_ratio, rel=1e-5)
    for i, own in enumerate(unpack_array(grad, plan)):
        for t in range(len(own)):
            nudge = np.zeros(len(own))
            nudge[t] = 1e-6
            shifted = [
                plain_critic(rollouts, values[:i] + [values[i] + s] + values[i + 1 :], 0.15)[0] for s in (nudge, -nudge)
            ]
            assert own[t] == pytest.approx((shifted[0] - shifted[1]) / 2e-6, abs=1e-6)


def test_critic_looks_at_responses_only():
    batch, new, _, _ = critic_batch("two rows")
    read = np.asarray(batch["train_mask"])
    spoil = lambda key: np.where(read, batch[key], np.nan).astype(np.float32)
    spoiled = Batch(arrays=dict(batch.arrays) | {key: spoil(key) for key in ("returns", "old_values")})
    before_response = np.pad(read, ((0, 0), (0, 1)))[:, 1:]
    run = lambda values, rows: jax.value_and_grad(
        lambda v: critic_loss({"values": v}, rows, parameters=PPOParameters()).loss.sum
    )(values)
    loss, grad = run(jnp.where(before_response, new, jnp.nan), spoiled)
    expected = run(jnp.asarray(new), batch)
    assert float(loss) == float(expected[0])
    np.testing.assert_array_equal(grad, expected[1])
    assert not np.asarray(grad)[~before_response].any() and np.asarray(grad).any()


def test_an_unchanged_critic_clips_nothing():
    batch, _, plan, rollouts = critic_batch("short rows")
    values = PACKINGS["short rows"].pack(rollouts)[0]["values"]
    metrics = finalize(make_critic_loss(PPOParameters()).fn({"values": jnp.asarray(values)}, batch).metrics)
    assert float(metrics["value_clip_ratio"]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gae_lambda": 1.5}, r"gae_lambda: found 1\.5; it must be in \[0, 1\]"),
        ({"eps_clip": 0.0}, "eps_clip: found"),
        ({"dual_clip": 0.5}, "dual_clip: found 0.5; it must be above 1"),
        ({"use_adaptive_kl_ctl": True, "kl_in": "loss"}, "use_adaptive_kl_ctl: found True"),
        ({"max_response_len": 0}, "max_response_len: found 0"),
    ],
)
def test_values_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        PPOParameters(**change)


def test_inputs_follow_the_options():
    rewards = ("rewards", "is_failed")
    assert PPOParameters().advantage_inputs == ("loss_mask", "logprobs", "has_eos", *rewards, "ref_logprobs", "values")
    assert "old_logprobs" in PPOParameters(recompute_logprobs=True).advantage_inputs
    assert "ref_logprobs" not in PPOParameters(kl_ctl=0).advantage_inputs
    assert "ref_logprobs" in PPOParameters(kl_in="loss").actor_inputs
    assert "ref_logprobs" not in PPOParameters().actor_inputs
