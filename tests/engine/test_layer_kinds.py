"""Layers of several kinds: a family that is data alone, and terms that layers add to the loss, against plain code."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.algorithms.sft import SFT_LOSS
from realjax.core.axes import train_rules
from realjax.core.compute import Compute
from realjax.core.generation_config import GenerationConfig
from realjax.core.metrics import finalize
from realjax.core.trees import Tree
from realjax.engine.batching import Request
from realjax.engine.compiled import place_batch
from realjax.engine.inference import make_evaluation
from realjax.engine.train import TrainOptions, make_gradients
from realjax.models import transformer
from realjax.models.build import Model, build_model
from realjax.models.config import AttentionConfig, LayerKind, MLPConfig, NormConfig, RopeConfig
from realjax.models.mlp import MLP
from tests.engine.generation_cases import EOS, run
from tests.given.compare import assert_close_in_norm
from tests.given.models import LEARNED, make_layout, make_model, place_params, quick_jit, random_tree
from tests.given.sequences import make_examples, one_per_row, pack_in_order

WINDOW, COEFFICIENT = 5, 0.3
NEAR, FAR = RopeConfig(theta=1e2), RopeConfig(theta=1e4, fraction=0.5, attention_factor=1.2)
SLIDING = LayerKind(
    name="sliding",
    mixer=AttentionConfig(window=WINDOW, rope=NEAR, qk_norm=NormConfig()),
    feed_forward=MLPConfig(activation="gelu_tanh"),
    attn_norm=NormConfig(one_plus=True),
    attn_post_norm=NormConfig(),
)
FULL = LayerKind(
    name="full",
    mixer=AttentionConfig(rope=FAR, qkv_bias=True, qk_norm=NormConfig(), qk_norm_whole=True),
    residual_scale=0.7,
    attn_post_norm=NormConfig(),
    mlp_post_norm=NormConfig(),
)
TOY = make_model(num_layers=4, pattern=(SLIDING, FULL), logit_scale=0.8)
EXAMPLES = make_examples([9, 30, 17, 3, 22, 8, 14, 12])
LAYOUTS = [{"dp": 2}, {"tp": 2}, {"pp": 2}]
SLOW = pytest.mark.slow
# With gradients, programs that take seconds to compile.
TRAINED = [{"tp": 2}, *(pytest.param(layout, marks=SLOW) for layout in ({"dp": 2}, {"pp": 2}))]


@dataclass(frozen=True, kw_only=True)
class PenalisedConfig(MLPConfig):
    """A feed-forward whose inputs are to stay small."""


class PenalisedMLP(MLP):
    """Gives the mean square of each real token's input as a term of the loss."""

    def __call__(self, x_RTD, context):
        squares = jnp.square(x_RTD.astype(jnp.float32)).mean(axis=-1)
        return super().__call__(x_RTD, context)[0], {"mean_square": jnp.sum(jnp.where(context.is_token, squares, 0))}

    @staticmethod
    def list_terms(config):
        return {"mean_square": COEFFICIENT}


@pytest.fixture
def penalised(monkeypatch) -> Model:
    """The toy family with that term in every second layer."""
    monkeypatch.setitem(transformer.FEED_FORWARDS, PenalisedConfig, PenalisedMLP)
    return build_model(replace(TOY.config, pattern=(SLIDING, replace(FULL, feed_forward=PenalisedConfig()))))


def plain_attention(x, layer, rope: RopeConfig, window: int | None):
    """Causal attention of rows `[B, T, D]` of one sequence each, 8 query and 2 key-value heads of 4."""
    T = x.shape[1]
    project = lambda name: jnp.einsum("btd,dnh->btnh", x, layer[name]["kernel"]) + layer[name].get("bias", 0.0)
    q, k, v = project("q"), project("k"), project("v")
    if "q_norm" in layer:
        q, k = plain_norm(q, layer["q_norm"]), plain_norm(k, layer["k_norm"])
    n = int(2 * rope.fraction)  # pairs that turn
    angles = jnp.arange(T)[:, None] / rope.theta ** (jnp.arange(n) / n)
    cos, sin = (rope.attention_factor * f(angles)[:, None] for f in (jnp.cos, jnp.sin))

    def turn(y):
        first, second, rest = y[..., :n], y[..., n : 2 * n], y[..., 2 * n :]
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)

    q, k, v = turn(q), jnp.repeat(turn(k), 4, axis=2), jnp.repeat(v, 4, axis=2)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / 2
    back = jnp.arange(T)[:, None] - jnp.arange(T)[None]
    seen = (back >= 0) & (back < (window or T))
    attended = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1), v)
    return jnp.einsum("btnh,nhd->btd", attended, layer["o"]["kernel"])


def plain_norm(x, params):
    scale = params["scale"] if "scale" in params else 1 + params["scale_less_one"]
    dims = tuple(range(-scale.ndim, 0))
    return x / jnp.sqrt(jnp.mean(x**2, axis=dims, keepdims=True) + 1e-5) * scale


def plain_logits(params: Tree, tokens):
    """Returns logits `[B, T, V]`, and the mean squares `[B, T]` of what the MLPs of the `full` layers read."""
    x, squares = params["embed"]["table"][tokens], []
    for i in range(4):
        name, rope, window, act = (
            ("sliding", NEAR, WINDOW, jax.nn.gelu) if i % 2 == 0 else ("full", FAR, None, jax.nn.silu)
        )
        layer = jax.tree.map(lambda leaf, n=i // 2: leaf[n], params["layers"][name])
        attended = plain_attention(plain_norm(x, layer["attn_norm"]), layer["attn"], rope, window)
        added = 1 if i % 2 == 0 else 0.7
        x = x + added * plain_norm(attended, layer["attn_post_norm"])
        h = plain_norm(x, layer["mlp_norm"])
        mlp = {part: layer["mlp"][part]["kernel"] for part in ("gate", "up", "down")}
        fed = (act(h @ mlp["gate"]) * (h @ mlp["up"])) @ mlp["down"]
        if name == "full":
            fed = plain_norm(fed, layer["mlp_post_norm"])
            squares.append(jnp.mean(h**2, axis=-1))
        x = x + added * fed
    return 0.8 * plain_norm(x, params["norm"]) @ params["head"]["kernel"], squares


def plain_loss(params: Tree, coefficient: float):
    """Returns the mean nll of the answers' tokens plus the term's mean by its coefficient, and that mean."""
    batch, _ = one_per_row(EXAMPLES)
    logits, squares = plain_logits(params, batch["tokens"])
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), batch["tokens"][:, 1:, None], axis=2)[..., 0]
    mask, is_token = batch["loss_mask"][:, 1:], batch["segment_ids"] > 0
    term = sum(jnp.sum(x * is_token) for x in squares) / (2 * is_token.sum())
    return -jnp.sum(logprobs * mask) / mask.sum() + coefficient * term, term


PLAIN_LOGITS = quick_jit(plain_logits)
PLAIN_LOSS = quick_jit(plain_loss, static_argnums=1)
PLAIN_GRADIENTS = quick_jit(jax.value_and_grad(plain_loss, has_aux=True), static_argnums=1)


def check_gradients(model: Model, coefficient: float, layout: dict, row_len: int, **options) -> None:
    """Compares loss, term and gradients of a step's first half with the plain ones."""
    params, layout = random_tree(model), make_layout(**layout)
    (loss, term), expected = PLAIN_GRADIENTS(params, coefficient)
    batch = place_batch(pack_in_order(EXAMPLES, row_len, num_rows=8)[0], train_rules(layout.strategy), layout)
    fn = quick_jit(make_gradients(model, SFT_LOSS, layout, TrainOptions(**options)))
    grads, sums = fn(place_params(model, params, layout), batch)
    assert float(sums.loss.value) == pytest.approx(float(loss), rel=1e-5)
    assert ("mean_square" in sums.metrics) == (coefficient > 0)
    if coefficient:
        assert coefficient * term > 0.05 * loss  # else a tolerance says little of it
        assert float(finalize(sums.metrics)["mean_square"]) == pytest.approx(float(term), rel=1e-5)
    assert_close_in_norm(jax.tree.map(lambda g: np.asarray(g) / sums.loss.weight, grads), expected, 2e-5)


@pytest.mark.parametrize("layout", TRAINED, ids=str)
def test_a_family_of_two_kinds_of_layer_is_data_alone(layout):
    check_gradients(TOY, 0.0, layout, 32)


@pytest.mark.parametrize(
    ("layout", "row_len", "options"),
    [
        pytest.param({"dp": 2, "zero": 1}, 64, {"num_mbs": 2, "compute": Compute(unroll=False)}, marks=SLOW),
        pytest.param({"pp": 2, "dp": 2}, 32, {"num_mbs": 2, "compute": Compute(remat=True)}, marks=SLOW),
        ({"dp": 2, "tp": 2, "sp": True, "zero": 3}, 32, {}),
    ],
    ids=str,
)
def test_terms_of_layers_are_means_however_a_batch_is_split(layout, row_len, options, penalised):
    check_gradients(penalised, COEFFICIENT, layout, row_len, **options)


def test_an_evaluation_reports_terms_beside_its_loss(penalised):
    params, layout = random_tree(penalised), make_layout()
    loss, term = PLAIN_LOSS(params, COEFFICIENT)
    sums = quick_jit(make_evaluation(penalised, SFT_LOSS, layout, Compute(), num_mbs=2))(
        params, pack_in_order(EXAMPLES, 32, num_rows=8)[0]
    )
    assert float(sums.loss.value) == pytest.approx(float(loss - COEFFICIENT * term), rel=1e-5)
    assert float(finalize(sums.metrics)["mean_square"]) == pytest.approx(float(term), rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_greedy_decoding_is_the_plain_forward_pass(layout):
    """Also of prompts and answers that a window's ring of 16 places has no room for."""
    params = random_tree(TOY, scale=0.4)
    config = GenerationConfig(max_new_tokens=20, min_new_tokens=18, greedy=True)
    prompts = [example["tokens"] for example in make_examples([3, 11, 40, 17])]
    requests = [Request(tokens=prompt, row_id=i) for i, prompt in enumerate(prompts)]
    found = run(TOY, params, config, make_layout(**layout), requests=requests)
    whole = [np.concatenate([prompt, generation.tokens]) for prompt, generation in zip(prompts, found, strict=True)]
    rows = np.stack([np.pad(tokens, (0, 60 - len(tokens))) for tokens in whole])
    logits = np.array(PLAIN_LOGITS(params, rows)[0])
    for prompt, tokens, best, generation in zip(prompts, whole, logits, found):
        assert len(generation.tokens) == 20 or generation.ended
        best[: len(prompt) + 17, EOS] = -np.inf
        best = best.argmax(axis=-1)
        np.testing.assert_array_equal(best[len(prompt) - 1 : len(tokens) - 1], generation.tokens)


def test_learned_positions_and_capped_logits_are_the_same_in_stages():
    model = make_model(**LEARNED, embed_scale=2.0, logit_softcap=3.0)
    params, config = random_tree(model, scale=0.4), GenerationConfig(max_new_tokens=8, top_k=20, temperature=0.7)
    requests = [Request(tokens=e["tokens"], row_id=i) for i, e in enumerate(make_examples([3, 11, 6, 8]))]
    one, stages = (run(model, params, config, make_layout(pp=pp), requests=requests) for pp in (1, 2))
    for a, b in zip(one, stages, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
    assert any(len(set(generation.tokens)) > 2 for generation in one)
