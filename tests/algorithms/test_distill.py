"""Divergences from a teacher are loops over tokens and outcomes in float64, in every packing, split and layout."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.algorithms.distill import DISTILL_INPUTS, DistillParameters, make_compare, make_distill_loss, make_draw
from realjax.core.axes import train_rules
from realjax.core.compute import Compute
from realjax.core.draw import Draw
from realjax.core.metrics import finalize
from realjax.engine.compiled import place_batch
from realjax.engine.inference import make_inference
from realjax.engine.train import TrainOptions, make_gradients
from realjax.models.heads import OTHERS, Chunks, Wanted, token_logprobs
from realjax.runtime.rollouts import list_targets
from tests.given.compare import assert_close_in_norm
from tests.given.models import make_layout, make_model, place_params, quick_jit, random_tree
from tests.given.sequences import make_examples, pack_in_order

V, D, NUM_TOKENS, TEMPERATURE = 50, 8, 47, 0.8
LENGTHS = (7, 1, 11, 3, 20, 9, 2)
BATCH = pack_in_order(make_examples(LENGTHS, vocab_size=NUM_TOKENS), 24, num_rows=4)[0]
SEGMENTS = BATCH["segment_ids"]
HAS_BEFORE = np.asarray(BATCH["positions"]) > 0
VARIANTS = {
    "forward": DistillParameters(divergence="forward_kl"),
    "reverse": DistillParameters(divergence="reverse_kl"),
    "jsd": DistillParameters(divergence="jsd", beta=0.3),
}


def make_inputs(seed: int):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((4, 24, D), np.float32), rng.standard_normal((D, V), np.float32)


def choose(hidden, kernel, k, chunks):
    wanted = Wanted(draw=Draw(TEMPERATURE, num_tokens=NUM_TOKENS), num_choices=k)
    return token_logprobs(hidden, kernel, BATCH["tokens"], SEGMENTS, chunks, wanted)


@cache
def choices_of_teacher(k):
    return quick_jit(lambda *inputs: choose(*inputs, k, Chunks(size=24)))(*make_inputs(0))


def exact_probs(hidden, kernel):
    """Of each token, given those before it, in float64: `[R, T, V]`, of the tokens that there are."""
    logits = (hidden.astype(np.float64) @ kernel.astype(np.float64))[:, :-1, :NUM_TOKENS] / TEMPERATURE
    logits = np.pad(logits, ((0, 0), (1, 0), (0, 0)))
    probs = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return probs / probs.sum(axis=-1, keepdims=True)


def plain_divergence(p, q, top, parameters):
    """Of two distributions over V tokens, and its derivative by the second's logits."""
    outcomes = [[v] for v in top] + [[v for v in range(len(p)) if v not in set(top)]]
    total, slope = 0.0, np.zeros(len(p))
    for members in outcomes:
        if not members:
            continue
        a, b = p[members].sum(), q[members].sum()
        m = parameters.beta * a + (1 - parameters.beta) * b
        if parameters.divergence == "forward_kl":
            term, of_b = a * np.log(a / b), -a / b
        elif parameters.divergence == "reverse_kl":
            term, of_b = b * np.log(b / a), np.log(b / a) + 1
        else:
            term = parameters.beta * a * np.log(a / m) + (1 - parameters.beta) * b * np.log(b / m)
            of_b = (1 - parameters.beta) * np.log(b / m)
        total += term
        slope[members] = of_b
    return total, q * (slope - (q * slope).sum())


@pytest.mark.parametrize("size", [6, 24])
@pytest.mark.parametrize("k", [1, 5, NUM_TOKENS])
def test_choices_are_the_likeliest_tokens_and_the_rest(k, size):
    inputs, chunks = make_inputs(0), Chunks(size=size, vocab_parts=5)
    outputs = {name: np.asarray(x) for name, x in quick_jit(lambda h, w: choose(h, w, k, chunks))(*inputs).items()}
    probs = exact_probs(*inputs)[HAS_BEFORE]
    ids, found = outputs["ids"][HAS_BEFORE], np.exp(outputs["choices"][HAS_BEFORE].astype(np.float64))
    np.testing.assert_array_equal(ids[:, :-1], np.argsort(-probs, axis=1, kind="stable")[:, :k])
    assert (ids[:, -1] == OTHERS).all()
    top = np.take_along_axis(probs, ids[:, :-1], axis=1)
    np.testing.assert_allclose(found[:, :-1], top, rtol=1e-5)
    rest = np.delete(np.sort(probs, axis=1)[:, ::-1], range(k), axis=1).sum(axis=1)
    np.testing.assert_allclose(found[:, -1], rest, rtol=1e-5, atol=1e-30)
    assert not outputs["choices"][~HAS_BEFORE].any(), "of a first token and of padding nothing is known"


def test_of_equal_tokens_those_left_out_are_among_the_rest():
    hidden, kernel = make_inputs(0)
    kernel = np.repeat(kernel[:, :10], 5, axis=1)  # each logit five times
    outputs = quick_jit(lambda *inputs: choose(*inputs, 3, Chunks(size=24)))(hidden, kernel)
    np.testing.assert_allclose(jnp.exp(outputs["choices"]).sum(axis=-1)[HAS_BEFORE], 1, rtol=1e-5)


@pytest.mark.parametrize("with_targets", [False, True])
@pytest.mark.parametrize("k", [4, NUM_TOKENS])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_divergence_and_its_gradient_are_those_of_a_loop(variant, k, with_targets):
    parameters, (teacher, student) = VARIANTS[variant], (make_inputs(0), make_inputs(1))
    weights = np.random.default_rng(2).standard_normal(SEGMENTS.shape).astype(np.float32) * HAS_BEFORE
    targets = list_targets(np.asarray(BATCH["loss_mask"]), np.asarray(BATCH["positions"])) if with_targets else None
    weights *= BATCH["loss_mask"] if with_targets else 1
    chunks = Chunks(size=6 if targets is None else targets.shape[1])
    chosen = choices_of_teacher(k)

    def weighted(hidden, kernel):
        wanted = Wanted(
            draw=Draw(TEMPERATURE, num_tokens=NUM_TOKENS),
            compare_fn=make_compare(parameters),
            teacher=(chosen["ids"], chosen["choices"]),
            targets=targets,
        )
        found = token_logprobs(hidden, kernel, BATCH["tokens"], SEGMENTS, chunks, wanted)["divergence"]
        return (found * weights).sum(), found

    grads, found = quick_jit(jax.grad(weighted, (0, 1), has_aux=True))(*student)
    p, q, of_logits = exact_probs(*teacher), exact_probs(*student), np.zeros((*SEGMENTS.shape, V))
    for row, time in np.argwhere(weights != 0):
        top = np.argsort(-p[row, time], kind="stable")[:k]
        expected, slope = plain_divergence(p[row, time], q[row, time], top, parameters)
        assert float(found[row, time]) == pytest.approx(expected, rel=1e-4, abs=1e-6)
        of_logits[row, time - 1, :NUM_TOKENS] = slope * weights[row, time] / TEMPERATURE
    hidden, kernel = (x.astype(np.float64) for x in student)
    np.testing.assert_allclose(grads[0], of_logits @ kernel.T, atol=2e-5)
    np.testing.assert_allclose(grads[1], np.einsum("RTD,RTV->DV", hidden, of_logits), atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_0_of_the_teacher_itself_and_grows_with_what_is_told_apart(variant):
    teacher, student = make_inputs(0), make_inputs(1)

    def total(model, k):
        chosen = choices_of_teacher(k)
        wanted = Wanted(
            draw=Draw(TEMPERATURE, num_tokens=NUM_TOKENS),
            compare_fn=make_compare(VARIANTS[variant]),
            teacher=(chosen["ids"], chosen["choices"]),
        )
        read = lambda *model: token_logprobs(*model, BATCH["tokens"], SEGMENTS, Chunks(size=24), wanted)["divergence"]
        return float(np.asarray(quick_jit(read)(*model))[HAS_BEFORE].sum())

    assert total(teacher, 5) == pytest.approx(0, abs=1e-4)
    sizes = [total(student, k) for k in (1, 4, 16, NUM_TOKENS)]
    assert 0 < sizes[0] < sizes[1] < sizes[2] < sizes[3]


SPREADS = {
    "one device": ({}, 1, 48, 8),
    "dp2 tp2 zero3": ({"dp": 2, "tp": 2, "sp": True, "zero": 3}, 2, 64, 4),
    "pp2 tp2 dp2": ({"dp": 2, "tp": 2, "pp": 2}, 2, 96, 8),
}


def train(spread: str):
    """Returns the mean loss of a student whose teacher is a smaller model, its gradients and metrics."""
    sizes, num_mbs, row_len, num_rows = SPREADS[spread]
    parameters = DistillParameters(divergence="jsd", top_k=7)
    teacher, student, layout = make_model(hidden_size=16), make_model(), make_layout(**sizes)
    batch, _ = pack_in_order(make_examples([17, 30, 8, 25, 40, 12, 33, 5]), row_len, num_rows=num_rows)
    draw = make_draw(parameters, 96)
    infer = quick_jit(make_inference(teacher, "choices", layout, Compute(), num_mbs, draw, parameters.top_k))
    placed = place_batch(batch, train_rules(layout.strategy), layout)
    chosen = infer(place_params(teacher, random_tree(teacher, seed=1, scale=0.5), layout), placed)
    batch = batch.with_arrays(teacher_ids=np.asarray(chosen["ids"]), teacher_logprobs=np.asarray(chosen["choices"]))
    batch = batch.select((*DISTILL_INPUTS, "segment_ids", "positions"))
    loss = make_distill_loss(parameters, 96)
    gradients = quick_jit(make_gradients(student, loss, layout, TrainOptions(num_mbs=num_mbs)))
    placed = place_batch(batch, train_rules(layout.strategy), layout)
    grads, sums = gradients(place_params(student, random_tree(student), layout), placed)
    metrics = {name: float(value) for name, value in finalize(sums.metrics).items()}
    weight = float(sums.loss.weight)
    return float(sums.loss.sum) / weight, jax.tree.map(lambda g: np.asarray(g) / weight, grads), metrics


train_on_one_device = cache(lambda: train("one device"))


@pytest.mark.parametrize("spread", [name for name in SPREADS if name != "one device"])
def test_training_does_not_depend_on_the_spread(spread):
    loss, grads, metrics = train(spread)
    expected_loss, expected_grads, expected_metrics = train_on_one_device()
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_close_in_norm(grads, expected_grads, 1e-5)
    assert metrics == pytest.approx(expected_metrics, rel=1e-5)
    assert 0.1 < metrics["teacher_rest"] < 0.9
