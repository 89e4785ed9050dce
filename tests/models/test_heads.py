from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.core.draw import REMOVED, Draw, KeptTokens
from realjax.models.heads import (
    Chunks,
    Wanted,
    chunk_len,
    token_logprobs,
    token_values,
    weighted_nll,
)
from realjax.runtime.rollouts import list_targets
from tests.given.models import quick_jit
from tests.given.sequences import make_examples, pack_in_order

R, T, D, V = 3, 24, 8, 50
BATCH = pack_in_order(make_examples([7, 1, 11, 3, 20, 9, 2], vocab_size=V), T, num_rows=R + 1)[0]
TOKENS, SEGMENTS = BATCH["tokens"], BATCH["segment_ids"]
IS_FIRST = np.asarray(BATCH["positions"] == 0)


def make_inputs(dtype=np.float32):
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((R + 1, T, D)).astype(np.float32)
    weights = rng.standard_normal((R + 1, T)).astype(np.float32)
    return jnp.asarray(hidden, dtype), jnp.asarray(rng.standard_normal((D, V)), dtype), weights


def naive_logprobs(hidden, kernel, temperature=1.0):
    """All logits at once, each token's own position looked up; 0 where nothing comes before it."""
    logprobs = jax.nn.log_softmax((hidden @ kernel).astype(jnp.float32) / temperature, axis=-1)
    before = jnp.take_along_axis(logprobs[:, :-1], TOKENS[:, 1:, None], axis=-1)[..., 0]
    return jnp.where(IS_FIRST, 0, jnp.pad(before, ((0, 0), (1, 0))))


@pytest.mark.parametrize("size", [1, 6, 24])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 5.0])
def test_token_logprobs_are_the_naive_ones_with_their_gradients(size, temperature):
    hidden, kernel, weights = make_inputs()

    def chunked(hidden, kernel):
        wanted = Wanted(draw=Draw(temperature))
        logprobs = token_logprobs(hidden, kernel, TOKENS, SEGMENTS, Chunks(size=size), wanted)["logprobs"]
        return (logprobs * weights).sum(), logprobs

    def naive(hidden, kernel):
        logprobs = naive_logprobs(hidden, kernel, temperature)
        return (logprobs * weights).sum(), logprobs

    grads, logprobs = quick_jit(jax.grad(chunked, (0, 1), has_aux=True))(hidden, kernel)
    expected_grads, expected = quick_jit(jax.grad(naive, (0, 1), has_aux=True))(hidden, kernel)
    np.testing.assert_allclose(logprobs, expected, atol=1e-5)
    for found, grad in zip(grads, expected_grads):
        np.testing.assert_allclose(found, grad, rtol=1e-4, atol=1e-5)


def random_sets(form: KeptTokens) -> tuple[np.ndarray, np.ndarray]:
    """Returns sets `[R, T, W]` for the tokens of the batch, every third of them empty, and their masks."""
    rng = np.random.default_rng(1)
    tokens = TOKENS.reshape(-1)
    mask = rng.random((tokens.size, V)) < (0.1 if form.form == "kept" else 0.6)
    if form.form == "removed":
        mask = ~np.isin(np.arange(V), [3, 7])[None] | (np.arange(tokens.size) % 2 == 0)[:, None]
    mask[np.arange(tokens.size), tokens] = True
    mask[::3] = True
    logits = np.where(mask, rng.standard_normal(mask.shape), REMOVED).astype(np.float32)
    packed = np.where(mask.all(axis=1)[:, None], 0, form.pack(jnp.asarray(logits), jnp.asarray(tokens)))
    return packed.reshape(*TOKENS.shape, -1), mask.reshape(*TOKENS.shape, V)


FORMS = [KeptTokens(V, 20, "kept"), KeptTokens(V, 2, "bits"), KeptTokens(V, 3, "removed")]


@pytest.mark.parametrize("size", [3, 9])
@pytest.mark.parametrize("form", [None, FORMS[0]], ids=["all", "kept"])
def test_targets_get_what_they_get_among_all_tokens_and_others_nothing(form, size):
    hidden, kernel, weights = make_inputs()
    kept = None if form is None else random_sets(form)[0]
    everything = Wanted(draw=Draw(0.7, form), kept=kept, needs_entropy=True)
    mask = np.random.default_rng(2).random(TOKENS.shape) < 0.5
    targets = list_targets(mask, BATCH["positions"])
    assert targets.shape == (R + 1, 9) and (targets == T).any() and (targets < T).sum() == (mask & ~IS_FIRST).sum()

    def run(chunks, wanted, hidden, kernel):
        outputs = token_logprobs(hidden, kernel, TOKENS, SEGMENTS, chunks, wanted)
        outputs = {name: jnp.where(mask & (SEGMENTS > 0), x, 0) for name, x in outputs.items()}
        return sum((x * weights).sum() for x in outputs.values()), outputs

    grad_fn = lambda fn: quick_jit(jax.grad(fn, (0, 1), has_aux=True))(hidden, kernel)
    some = replace(everything, targets=targets)
    found = grad_fn(partial(run, Chunks(size=size), some))
    expected = grad_fn(partial(run, Chunks(size=T), everything))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    outputs = token_logprobs(hidden, kernel, TOKENS, SEGMENTS, Chunks(size=size), some)
    assert all((np.asarray(x)[~mask] == 0).all() for x in outputs.values())


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.form)
@pytest.mark.parametrize(("temperature", "size"), [(1.0, 6), (0.6, 24)])
def test_log_probabilities_and_entropy_are_of_the_distribution_drawn_from(form, temperature, size):
    hidden, kernel, weights = make_inputs()
    kept, mask = random_sets(form)

    def chunked(hidden, kernel):
        wanted = Wanted(draw=Draw(temperature, form), kept=kept, needs_entropy=True)
        outputs = token_logprobs(hidden, kernel, TOKENS, SEGMENTS, Chunks(size=size), wanted)
        return ((outputs["logprobs"] + 0.7 * outputs["entropy"]) * weights).sum(), outputs

    def naive(hidden, kernel):
        logits = jnp.pad((hidden @ kernel)[:, :-1], ((0, 0), (1, 0), (0, 0))) / temperature
        logprobs = jax.nn.log_softmax(jnp.where(mask, logits, -1e30), axis=-1)
        entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
        drawn = jnp.take_along_axis(logprobs, TOKENS[..., None], axis=-1)[..., 0]
        outputs = {"logprobs": jnp.where(IS_FIRST, 0, drawn), "entropy": jnp.where(IS_FIRST, 0, entropy)}
        return ((outputs["logprobs"] + 0.7 * outputs["entropy"]) * weights).sum(), outputs

    grads, outputs = quick_jit(jax.grad(chunked, (0, 1), has_aux=True))(hidden, kernel)
    expected_grads, expected = quick_jit(jax.grad(naive, (0, 1), has_aux=True))(hidden, kernel)
    for name in ("logprobs", "entropy"):
        np.testing.assert_allclose(outputs[name], expected[name], atol=1e-5)
    for found, grad in zip(grads, expected_grads):
        np.testing.assert_allclose(found, grad, rtol=1e-4, atol=1e-5)


def exact_capped_logits(hidden, kernel, cap, temperature):
    """Returns float64 logits `[R, T, V]` over the temperature, and their derivative by those before the cap."""
    raw = np.einsum("RTD,DV->RTV", np.asarray(hidden, np.float64), np.asarray(kernel, np.float64))
    capped = cap * np.tanh(raw / cap)
    return capped / temperature, (1 - (capped / cap) ** 2) / temperature


@pytest.mark.parametrize("size", [6, 24])
@pytest.mark.parametrize("form", [None, FORMS[0], FORMS[1]], ids=["all", "kept", "bits"])
def test_capped_logits_and_all_that_follows_from_them_are_plain_maths_in_float64(form, size):
    """Log-probabilities, the entropy of the kept tokens and the gradient of both, by hand."""
    hidden, kernel, weights = make_inputs()
    cap, temperature = 2.0, 0.7
    kept, mask = (None, np.ones((*TOKENS.shape, V), bool)) if form is None else random_sets(form)
    wanted = Wanted(draw=Draw(temperature, form), kept=kept, needs_entropy=True)

    def chunked(hidden, kernel):
        outputs = token_logprobs(hidden, kernel, TOKENS, SEGMENTS, Chunks(size=size, softcap=cap), wanted)
        return ((outputs["logprobs"] + 0.7 * outputs["entropy"]) * weights).sum(), outputs

    grads, outputs = quick_jit(jax.grad(chunked, (0, 1), has_aux=True))(hidden, kernel)
    logits, slope = exact_capped_logits(hidden, kernel, cap, temperature)
    targets, mask, is_target = TOKENS[:, 1:, None], mask[:, 1:], np.eye(V)[TOKENS[:, 1:]]
    logits = np.where(mask, logits[:, :-1], -np.inf)
    logprobs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    probs, safe = np.exp(logprobs), np.where(mask, logprobs, 0)
    entropy = -(probs * safe).sum(-1)
    shown = ~IS_FIRST[:, 1:]
    expected = {"logprobs": np.take_along_axis(safe, targets, 2)[..., 0], "entropy": entropy}
    for name, value in expected.items():
        np.testing.assert_allclose(np.asarray(outputs[name])[:, 1:], value * shown, atol=2e-6)
    of_logits = is_target - probs - 0.7 * probs * (safe + entropy[..., None])
    of_raw = of_logits * slope[:, :-1] * (weights[:, 1:] * shown)[..., None]
    exact = np.einsum("RTV,DV->RTD", of_raw, kernel), np.einsum("RTD,RTV->DV", hidden[:, :-1], of_raw)
    np.testing.assert_allclose(grads[0][:, :-1], exact[0], atol=1e-5)
    np.testing.assert_allclose(grads[1], exact[1], atol=2e-5)


@pytest.mark.parametrize("size", [6, 24])
def test_the_fused_loss_of_capped_logits_has_the_gradient_of_the_plain_one(size):
    hidden, kernel, weights = make_inputs()
    chunks = Chunks(size=size, softcap=2.0)
    fused = lambda hidden, kernel: weighted_nll(hidden, kernel, TOKENS, SEGMENTS, weights, chunks)[0]
    plain = lambda hidden, kernel: (
        -(token_logprobs(hidden, kernel, TOKENS, SEGMENTS, chunks)["logprobs"] * weights).sum()
    )
    (found, grads), (expected, expected_grads) = (
        quick_jit(jax.value_and_grad(fn, (0, 1)))(hidden, kernel) for fn in (fused, plain)
    )
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    for ours, theirs in zip(grads, expected_grads):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 6, 24])
@pytest.mark.parametrize("scale", [1.0, -2.5])
def test_weighted_nll_is_the_naive_sum_with_its_gradients(size, scale):
    hidden, kernel, weights = make_inputs()

    def fused(hidden, kernel):
        nll, logprobs = weighted_nll(hidden, kernel, TOKENS, SEGMENTS, weights, Chunks(size=size))
        # What is reported beside the loss must not leak into its gradient.
        return scale * nll + 10 * logprobs.sum() - jax.lax.stop_gradient(10 * logprobs.sum()), (nll, logprobs)

    grads, (nll, logprobs) = quick_jit(jax.grad(fused, (0, 1), has_aux=True))(hidden, kernel)
    without_grad = quick_jit(fused)(hidden, kernel)[1]
    naive = lambda hidden, kernel: -(naive_logprobs(hidden, kernel) * weights).sum()
    expected, expected_grads = quick_jit(jax.value_and_grad(naive, (0, 1)))(hidden, kernel)
    for found_nll, found_logprobs in ((nll, logprobs), without_grad):
        assert found_nll == pytest.approx(float(expected), rel=1e-5)
        np.testing.assert_allclose(found_logprobs, naive_logprobs(hidden, kernel), atol=1e-5)
    for found, grad in zip(grads, expected_grads):
        np.testing.assert_allclose(found, scale * grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [3, 9])
def test_weighted_nll_of_targets_is_that_of_all_tokens_with_its_gradients(size):
    hidden, kernel, weights = make_inputs()
    mask = np.random.default_rng(2).random(TOKENS.shape) < 0.5
    weights, targets = weights * mask, list_targets(mask, BATCH["positions"])

    def run(chunks, targets):
        fn = lambda hidden, kernel: weighted_nll(hidden, kernel, TOKENS, SEGMENTS, weights, chunks, targets)
        return quick_jit(jax.value_and_grad(fn, (0, 1), has_aux=True))(hidden, kernel)

    ((found, logprobs), grads), ((expected, all_logprobs), expected_grads) = (
        run(Chunks(size=size), targets), run(Chunks(size=8), None)
    )  # fmt: skip
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    np.testing.assert_allclose(logprobs, np.where(mask, all_logprobs, 0), atol=1e-6)
    for ours, theirs in zip(grads, expected_grads):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [6, 24])
def test_bfloat16_inputs_keep_float32_logprobs(size):
    hidden, kernel, weights = make_inputs(jnp.bfloat16)
    exact = [np.asarray(x, np.float32) for x in (hidden, kernel)]

    def nll(hidden, kernel):
        return weighted_nll(hidden, kernel, TOKENS, SEGMENTS, weights, Chunks(size=size))

    grads, logprobs = quick_jit(jax.grad(nll, (0, 1), has_aux=True))(hidden, kernel)
    assert logprobs.dtype == jnp.float32 and [g.dtype for g in grads] == [jnp.bfloat16] * 2
    # Inputs are rounded, products and sums are not.
    np.testing.assert_allclose(logprobs, naive_logprobs(*exact), atol=1e-4)
    expected = jax.grad(lambda h, k: -(naive_logprobs(h, k) * weights).sum(), (0, 1))(*exact)
    for found, grad in zip(grads, expected):
        assert np.linalg.norm(np.asarray(found, np.float32) - grad) < 1e-2 * np.linalg.norm(grad)


def test_first_tokens_and_padding_have_no_logprob_and_no_weight():
    hidden, kernel, weights = make_inputs()
    logprobs = token_logprobs(hidden, kernel, TOKENS, SEGMENTS, Chunks(size=8))["logprobs"]
    assert ((np.asarray(logprobs) == 0) == (IS_FIRST | (SEGMENTS == 0))).all()
    nll = lambda weights: weighted_nll(hidden, kernel, TOKENS, SEGMENTS, weights, Chunks(size=8))[0]
    assert nll(weights) == nll(np.where(IS_FIRST, 1e6, weights))


def test_logprobs_of_a_certain_model_are_zero_and_of_huge_logits_finite():
    kernel = jnp.eye(V)
    targets = jnp.pad(TOKENS, ((0, 0), (0, 1)))[:, 1:]
    logprobs = token_logprobs(1e4 * kernel[targets], kernel, TOKENS, SEGMENTS, Chunks(size=4))["logprobs"]
    assert (logprobs == 0).all()
    worst = token_logprobs(-1e4 * kernel[targets], kernel, TOKENS, SEGMENTS, Chunks(size=4))["logprobs"]
    assert jnp.isfinite(worst).all() and (worst[~IS_FIRST & (SEGMENTS > 0)] < -1e3).all()


def test_values_are_the_scalar_heads_outputs():
    hidden, kernel, _ = make_inputs(jnp.bfloat16)
    values = token_values(hidden, kernel[:, :1])
    expected = np.asarray(hidden, np.float32) @ np.asarray(kernel[:, 0], np.float32)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, expected, atol=1e-4)


@pytest.mark.parametrize("row_len", [1, 7, 96, 1000])
@pytest.mark.parametrize("rows, vocab, max_bytes", [(1, 50, 1 << 28), (4, 1000, 100_000), (8, 151_936, 1000)])
def test_a_chunk_divides_the_row_and_stays_under_its_bytes(row_len, rows, vocab, max_bytes):
    size = chunk_len(row_len, rows, vocab, max_bytes)
    fits = lambda n: 4 * n * rows * vocab <= max_bytes
    assert row_len % size == 0 and (size == 1 or fits(size))
    assert not any(row_len % n == 0 and fits(n) for n in range(size + 1, row_len + 1))
