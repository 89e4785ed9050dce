"""Prompts and then tokens one by one, through the cache, give the hidden states of a whole forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.engine.attention.reference import dense_attention, dense_decoding
from realjax.models.cache import decode, grow_cache, init_cache, prefill, write_rows
from realjax.models.transformer import Forward
from tests.given.models import FULL, make_model, quick_jit, random_tree

LENGTHS, ROW_LEN = [3, 7, 5], 12


@pytest.mark.parametrize("changes", [{}, {"window": 4, **FULL}], ids=["plain", "window"])
def test_prefill_and_decode_give_the_hidden_states_of_a_forward_pass(changes):
    model, forward = make_model(**changes), Forward(attention_fn=dense_attention)
    params = random_tree(model)
    tokens = np.random.default_rng(0).integers(0, 96, (3, ROW_LEN)).astype(np.int32)
    row = (jnp.asarray(tokens), jnp.broadcast_to(jnp.arange(ROW_LEN), tokens.shape), jnp.ones_like(tokens))
    whole = quick_jit(lambda params: model.bind(params)(*row, forward)[0])(params)

    @quick_jit
    def admit(params, prompts, lengths, places):
        hidden, rows = prefill(*model.bind_layers(params), prompts, lengths, forward)
        return hidden, write_rows(init_cache(model.config, 2, (4,), 8, jnp.float32), rows, np.arange(3), places)

    @quick_jit
    def advance(params, cache, tokens, lengths):
        return decode(*model.bind_layers(params), cache, tokens, lengths, dense_decoding, forward)

    layers = [jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(model.config.num_layers)]
    unstacked, places = {**params, "layers": layers}, np.array([2, 0, 3])
    hidden, cache = admit(unstacked, tokens[:, :7], np.array(LENGTHS), places)
    np.testing.assert_allclose(hidden, [whole[i, n - 1] for i, n in enumerate(LENGTHS)], atol=1e-5, rtol=1e-5)
    for step in range(ROW_LEN - max(LENGTHS)):
        if max(LENGTHS) + step >= cache.length:
            cache = grow_cache(cache, 16)
        at = np.zeros(4, np.int32)
        at[places] = np.array(LENGTHS) + step
        new = np.zeros(4, np.int32)
        new[places] = tokens[range(3), at[places]]
        hidden, cache = advance(unstacked, cache, new, at)
        expected = [whole[i, n + step] for i, n in enumerate(LENGTHS)]
        np.testing.assert_allclose(hidden[places], expected, atol=1e-5, rtol=1e-5)


def test_a_prompt_without_a_slot_changes_nothing():
    model = make_model()
    cache = init_cache(model.config, 2, (2,), 8, jnp.float32)
    rows = init_cache(model.config, 2, (3,), 4, jnp.float32)
    rows = type(rows)(tuple(x + 1 for x in rows.keys), tuple(x + 2 for x in rows.values))
    written = write_rows(cache, rows, jnp.array([0, 1, 2]), jnp.array([2, 1, 2]))
    for layer in (*written.keys, *written.values):
        assert not layer[0].any()
    assert all((x[1, :, :, :4] == 1).all() and not x[1, :, :, 4:].any() for x in written.keys)
    assert all((x[1, :, :4] == 2).all() and not x[1, :, 4:].any() for x in written.values)
