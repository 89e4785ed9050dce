"""Experts see the tokens that are read, and no others: not padding, nor slots without a row or whose row has ended."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from realjax.core.axes import generate_rules
from realjax.core.generation_config import GenerationConfig
from realjax.core.trees import Tree
from realjax.engine.batching import generate
from realjax.models.config import LayerKind, MoEConfig
from realjax.models.products import ExpertsFn, Routed
from tests.engine.generation_cases import make_programs, make_requests
from tests.given.models import make_layout, make_model, place_params, random_tree

MOE = MoEConfig(num_experts=5, experts_per_token=2, expert_size=12)
MODEL = make_model(pattern=(LayerKind(name="dense"), LayerKind(name="sparse", feed_forward=MOE)), num_layers=4)


@pytest.mark.parametrize("num_slots", [2, 8])
def test_the_load_of_experts_is_that_of_the_tokens_that_are_read(num_slots):
    """Of 8 slots five stay free, of 2 one is left idle by the last row; prompts are padded to 32 tokens."""
    loads: list[np.ndarray] = []

    def count(ids: jax.Array) -> None:
        loads.append(np.bincount(np.asarray(ids).ravel(), minlength=MOE.num_experts + 1))

    def watch(fn: ExpertsFn, routed: Routed, params: Tree, names: Tree) -> jax.Array:
        jax.debug.callback(count, routed.ids)
        return fn(routed, params)

    layout = make_layout()
    config = GenerationConfig(max_new_tokens=9, min_new_tokens=0, top_k=96, top_p=1.0)
    programs = make_programs(MODEL, config, layout, num_slots=num_slots)
    forward = programs.cached.forward
    programs.cached.forward = replace(forward, products=replace(forward.products, over_experts=watch))
    params = place_params(MODEL, random_tree(MODEL, scale=0.4), layout, generate_rules(layout.strategy))
    requests = make_requests(MODEL.config.vocab_size, [3, 17, 8])
    found = generate(programs, params, requests)
    jax.effects_barrier()
    # The last token of each is drawn and not run.
    num_tokens = sum(len(r.tokens) + len(g.tokens) - 1 for r, g in zip(requests, found, strict=True))
    load = np.sum(loads, axis=0)
    assert load[:-1].sum() == num_tokens * MOE.experts_per_token * len(MODEL.config.routed_layers)
    assert load[-1] > 0  # idle ones were there
