"""Logits, losses and gradients are those of transformers, on rows of one sequence and on packed rows."""

from functools import partial

import jax
import numpy as np
import pytest

from realjax.algorithms.sft import SFT_LOSS
from realjax.core.axes import train_rules
from realjax.core.compute import Compute
from realjax.engine.attention.choose import make_attention
from realjax.engine.attention.reference import dense_attention
from realjax.engine.compiled import place_batch
from realjax.engine.inference import make_inference
from realjax.engine.train import TrainOptions, make_gradients
from realjax.hf.families import FAMILIES
from tests.given.compare import assert_close_in_norm
from tests.given.models import CASE, FIRST_KINDS, KINDS, PORTABLE_KERNELS, SIZES, make_layout, place_params, quick_jit
from tests.given.sequences import make_examples, one_per_row, pack_in_order, unpack_array
from tests.parity.theirs import (
    make_ours,
    make_their_critic,
    make_theirs,
    our_logits,
    their_gradients,
    their_logits,
    to_ours,
)

pytest.importorskip("transformers")

# Beyond the original 32 positions of the scaled rotary embedding, and beyond a window of 8.
EXAMPLES = make_examples([60, 5, 33, 9, 21, 1, 47, 16], vocab_size=SIZES["vocab_size"])


# Where masks differ all kernels are compared; what a kernel is given otherwise is the same for every family.
KERNELS = {"llama": PORTABLE_KERNELS, "qwen2-windows": PORTABLE_KERNELS}
TOLERANCE = 2e-5  # of the largest logit
# transformers computes sequences of fewer tokens in another way than longer ones, see "Long rotary embeddings" in
# docs/models.md.
FEWEST_TOKENS = {"phi3-long": 5}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind):
    """Every sequence has its own run in transformers; rows of 128 make attention work in blocks."""
    theirs = make_theirs(kind)
    model, params = make_ours(theirs)
    examples = [example for example in EXAMPLES if len(example["tokens"]) >= FEWEST_TOKENS.get(kind, 0)]
    expected = [their_logits(theirs, example["tokens"]) for example in examples]
    largest = max(np.abs(logits).max() for logits in expected)
    order = sorted(range(len(examples)), key=lambda i: (i * 5) % 7)
    for batch, plan in (one_per_row(examples), pack_in_order(examples, 128, order=order)):
        for kernel in KERNELS.get(kind, ("blocked",)):
            logits_fn = quick_jit(partial(our_logits, model, attention_fn=make_attention(kernel, CASE)))
            for logits, theirs_alone in zip(unpack_array(logits_fn(params, batch=batch), plan), expected):
                np.testing.assert_allclose(logits, theirs_alone, rtol=0, atol=TOLERANCE * largest)


def test_every_supported_family_is_compared():
    assert {model_type for model_type, _ in KINDS.values()} == FAMILIES.keys()


def test_long_positions_are_rotated_as_transformers_does():
    """Llama 3.1's own scaling, at positions near the end of its 131,072 tokens."""
    torch = pytest.importorskip("torch")
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    theirs = make_theirs("llama", rope_parameters={**rope, "original_max_position_embeddings": 8192}, head_dim=64)
    model, params = make_ours(theirs)
    tokens = EXAMPLES[0]["tokens"][None]
    for first in (8000, 131000):
        positions = first + np.arange(tokens.shape[1], dtype=np.int32)[None]
        batch = {"tokens": tokens, "positions": positions, "segment_ids": np.ones_like(positions)}
        logits = our_logits(model, params, batch, dense_attention)
        with torch.no_grad():
            expected = theirs(
                torch.from_numpy(tokens).long(), position_ids=torch.from_numpy(positions).long(), use_cache=False
            ).logits
        # One rounding of an angle of 131,000 radians is 0.008, so nothing closer can be asked there.
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 if first == 8000 else 2e-2)


@pytest.mark.parametrize("kind", ["llama-tied", "llama-biases", "qwen2-window", "qwen3", "llama3-rope", "qwen3_moe"])
def test_loss_and_every_gradient_are_those_of_pytorch(kind):
    theirs = make_theirs(kind)
    model, params = make_ours(theirs)
    expected_loss, expected_grads = their_gradients(theirs, EXAMPLES)
    layout = make_layout(dp=2, tp=4, zero=3, sp=True)
    batch = pack_in_order(EXAMPLES, 64, num_rows=4)[0]
    grads, sums = quick_jit(make_gradients(model, SFT_LOSS, layout, TrainOptions(num_mbs=2)))(
        place_params(model, params, layout), place_batch(batch, train_rules(layout.strategy), layout)
    )
    weight = float(sums.loss.weight)
    assert float(sums.loss.sum) / weight == pytest.approx(expected_loss, rel=1e-5)
    grads = jax.tree.map(lambda g: np.asarray(g) / weight, grads)
    assert_close_in_norm(grads, to_ours(model, expected_grads), 1e-5)


@pytest.mark.parametrize("kind", FIRST_KINDS)
def test_critic_values_are_the_scores_of_a_classifier_of_one_label(kind):
    theirs, score = make_their_critic(kind)
    model, params = make_ours(theirs)
    batch, plan = pack_in_order(EXAMPLES, 64, num_rows=4)
    values_fn = partial(our_logits, model, attention_fn=make_attention("blocked", CASE))
    values = unpack_array(quick_jit(values_fn)(params, batch=batch), plan)
    expected = [score(example["tokens"]) for example in EXAMPLES]
    largest = max(np.abs(scores).max() for scores in expected)
    for value, scores in zip(values, expected):
        np.testing.assert_allclose(value, scores, rtol=0, atol=TOLERANCE * largest)


def test_the_head_of_values_is_a_classifiers():
    theirs, score = make_their_critic("llama")
    model, params = make_ours(theirs)
    layout = make_layout(dp=2, tp=2, sp=True)
    batch, plan = pack_in_order(EXAMPLES, 64, num_rows=4)
    inference = quick_jit(make_inference(model, "values", layout, Compute()))
    placed = place_batch(batch, train_rules(layout.strategy), layout)
    values = unpack_array(inference(place_params(model, params, layout), placed)["values"], plan)
    for example, value in zip(EXAMPLES, values):
        np.testing.assert_allclose(value, score(example["tokens"])[:, 0], rtol=0, atol=1e-4)
