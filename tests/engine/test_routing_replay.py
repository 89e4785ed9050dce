"""What the sampler records of experts is what a later pass goes through, whatever its own router would choose."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from realjax.core.axes import train_rules
from realjax.core.batch import Batch
from realjax.core.compute import Compute
from realjax.core.generation_config import GenerationConfig
from realjax.core.routes import Routes
from realjax.core.trees import Tree
from realjax.engine import forward
from realjax.engine.batching import Generation
from realjax.engine.compiled import place_batch
from realjax.engine.inference import make_inference
from realjax.models.config import LayerKind, MoEConfig
from realjax.models.products import ExpertsFn, Routed
from tests.engine.generation_cases import make_requests, run
from tests.given.models import make_layout, make_model, place_params, quick_jit, random_tree
from tests.given.sequences import pack_in_order

MOE = MoEConfig(num_experts=6, experts_per_token=3, expert_size=24, scores="sigmoid", has_offset=True, renormalise=True)
PATTERN = (LayerKind(name="dense"), LayerKind(name="sparse", feed_forward=MOE))
MODEL = make_model(pattern=PATTERN, num_layers=4)
CONFIG = GenerationConfig(max_new_tokens=6, min_new_tokens=0, top_k=96, top_p=1.0)
REQUESTS = make_requests(MODEL.config.vocab_size, [3, 17, 8, 1])
ROUNDING = 1e-5  # of float32, of log-probabilities of their size and of logits some times larger


@pytest.mark.parametrize("form", [Routes(3, 2, 6), Routes(5, 3, 255), Routes(2, 2, 256), Routes(1, 1, 4000)], ids=str)
def test_experts_are_stored_in_few_words(form):
    shape = (2, 7, form.num_layers, form.per_token)
    ids = np.random.default_rng(0).integers(0, form.num_experts, shape)
    ids[0, 0] = form.num_experts - 1
    words = form.pack(ids)
    assert words.dtype == np.int32 and words.shape == (2, 7, form.width)
    np.testing.assert_array_equal(form.unpack(words), ids + 1)
    assert not np.any(form.unpack(np.zeros_like(words)))
    assert form.width == -(-form.num_layers * form.per_token // (4 if form.num_experts < 256 else 2))


def twins(params: Tree) -> tuple[Tree, Tree]:
    """Returns parameters whose experts are twins for the router, 0 and 1, 2 and 3, 4 and 5, in two roundings: of one
    pair it takes both, of the next the one in the first and the other in the second. What they compute is unlike. Only
    offsets are rounded, which choose and have no part in the weights.
    """
    router = params["layers"]["sparse"]["mlp"]["router"]
    pairs = {name: np.repeat(leaf[..., ::2], 2, axis=-1) for name, leaf in router.items()}
    lean = lambda sign: pairs["offset"] + sign * np.array([0, 1] * 3, np.float32) * 1e-5

    def with_offset(offset: np.ndarray) -> Tree:
        sparse = params["layers"]["sparse"]
        mlp = {**sparse["mlp"], "router": {**pairs, "offset": offset}}
        return {**params, "layers": {**params["layers"], "sparse": {**sparse, "mlp": mlp}}}

    return with_offset(lean(-1)), with_offset(lean(1))


@pytest.fixture(scope="module")
def sampled() -> tuple[Tree, list[Generation]]:
    """The parameters of the second rounding, and what was generated in the first."""
    ours, theirs = twins(random_tree(MODEL, scale=0.4))
    return theirs, run(MODEL, ours, CONFIG, requests=REQUESTS, records_routes=True)


def pack(generations: list[Generation], *, with_routes: bool) -> Batch:
    examples = []
    for request, generation in zip(REQUESTS, generations, strict=True):
        tokens = np.concatenate([request.tokens, generation.tokens])
        answer = np.arange(len(tokens)) >= len(request.tokens)
        logprobs = np.pad(generation.logprobs, (len(request.tokens), 0))
        example = {"tokens": tokens, "loss_mask": answer, "logprobs": logprobs}
        examples.append(example | ({"routes": generation.routes} if with_routes else {}))
    return pack_in_order(examples, 32, num_rows=4)[0]


def score(params: Tree, batch: Batch, layout: dict, num_mbs: int = 2) -> np.ndarray:
    """Returns the log-probabilities `[N]` of the answers' tokens in a later pass."""
    placed = make_layout(**layout)
    inference = quick_jit(make_inference(MODEL, "logprobs", placed, Compute(), num_mbs=num_mbs))
    rules = train_rules(placed.strategy)
    found = inference(place_params(MODEL, params, placed, rules), place_batch(batch, rules, placed))["logprobs"]
    return np.asarray(found)[batch["loss_mask"]]


@pytest.mark.parametrize("layout", [{}, pytest.param({"pp": 2, "tp": 2}, marks=pytest.mark.slow)], ids=str)
def test_a_replayed_pass_has_the_samplers_log_probabilities_where_the_router_would_choose_otherwise(layout, sampled):
    """But for the order of float32 sums, which differs between any two programs, of dense models too."""
    params, generations = sampled
    batch = pack(generations, with_routes=True)
    sampled_logprobs = batch["logprobs"][batch["loss_mask"]]
    np.testing.assert_allclose(score(params, batch, layout), sampled_logprobs, rtol=ROUNDING, atol=ROUNDING)
    if not layout:
        own = score(params, pack(generations, with_routes=False), layout)
        assert np.abs(own - sampled_logprobs).max() > 0.1


def test_a_replayed_pass_goes_through_just_the_recorded_experts(sampled, monkeypatch):
    params, generations = sampled
    batch, seen = pack(generations, with_routes=True), list[np.ndarray]()

    def watch(fn: ExpertsFn, routed: Routed, params: Tree, names: Tree) -> jax.Array:
        jax.debug.callback(lambda ids: seen.append(np.asarray(ids)), routed.ids, ordered=True)
        return fn(routed, params)

    make = forward.make_products
    monkeypatch.setattr(forward, "make_products", lambda *given: replace(make(*given), over_experts=watch))
    score(params, batch, {}, num_mbs=1)
    jax.effects_barrier()
    ids, recorded = np.stack(seen, axis=2), np.asarray(MODEL.config.routes.unpack(batch["routes"])).astype(int) - 1
    is_known, is_token = recorded >= 0, batch["segment_ids"] > 0
    # Of all but the last token of each sequence, which nothing followed; padding goes nowhere.
    assert is_known.all(axis=(2, 3)).sum() == is_token.sum() - len(generations)
    np.testing.assert_array_equal(ids[is_known], recorded[is_known])
    assert np.all(ids[~is_token] == MOE.num_experts)


def test_a_row_that_goes_on_keeps_the_experts_of_what_it_began_with(sampled):
    _, generations = sampled
    ours, theirs = twins(random_tree(MODEL, scale=0.4))
    cut = lambda generation, n: replace(
        generation,
        tokens=generation.tokens[:n],
        logprobs=generation.logprobs[:n],
        ended=False,
        routes=np.pad(generation.routes[: -len(generation.tokens) + n - 1], ((0, 1), (0, 0))),
    )
    long = [i for i, generation in enumerate(generations) if len(generation.tokens) > 3]
    requests = [replace(REQUESTS[i], begun=cut(generations[i], 3)) for i in long]
    for i, found in zip(long, run(MODEL, theirs, CONFIG, requests=requests, records_routes=True)):
        num_kept = len(REQUESTS[i].tokens) + 2
        np.testing.assert_array_equal(found.routes[:num_kept], generations[i].routes[:num_kept])
        assert found.routes.shape == (len(REQUESTS[i].tokens) + len(found.tokens), generations[i].routes.shape[1])
        form = MODEL.config.routes
        own, other = (np.asarray(form.unpack(x.routes[num_kept])) for x in (found, generations[i]))
        assert np.all(own[0] - 1 == (other[0] - 1) ^ 1)  # its last token's are new, and the twins
