"""Prompts and then new tokens, through the cache, give the hidden states of a whole forward pass."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from realjax.engine.attention.reference import dense_attention, dense_decoding
from realjax.models.cache import NewTokens, decode, grow_cache, init_cache, prefill, write_rows
from realjax.models.config import RING_MULTIPLE, AttentionConfig, LayerKind, count_places
from realjax.models.stacks import list_layers, split_kinds
from realjax.models.transformer import Forward
from tests.given.models import FULL, make_model, quick_jit, random_tree

SLIDING, WIDE = (LayerKind(name=f"window{n}", mixer=AttentionConfig(window=n, sinks=True)) for n in (5, 20))


@pytest.mark.parametrize(
    ("changes", "lengths", "row_len", "num_new"),
    [
        (FULL, [3, 7, 5], 12, 1),
        (FULL, [3, 7, 5], 16, 3),
        ({"pattern": (SLIDING, LayerKind())}, [3, 7, 5], 40, 1),  # a ring of 16, shorter at first
        ({"pattern": (SLIDING, LayerKind())}, [3, 7, 5], 40, 12),
        ({"pattern": (SLIDING, WIDE), "num_layers": 2}, [3, 30, 17], 44, 1),  # rings of 16 and 32, a longer prompt
        ({"pattern": (SLIDING, WIDE), "num_layers": 2}, [3, 30, 17], 60, 12),  # as many more as both have places for
    ],
)
def test_prefill_and_decode_give_the_hidden_states_of_a_forward_pass(changes, lengths, row_len, num_new):
    """Of `num_new` tokens a row at once, all but the first are wrong every other time, and taken in again."""
    model, forward = make_model(**changes), Forward(attention_fn=dense_attention)
    params, order, room = random_tree(model), model.config.order, max(lengths) + 1
    tokens = np.random.default_rng(0).integers(0, 96, (3, row_len)).astype(np.int32)
    row = (jnp.asarray(tokens), jnp.broadcast_to(jnp.arange(row_len), tokens.shape), jnp.ones_like(tokens))
    whole = quick_jit(lambda params: model.bind(params)(*row, forward)[0])(params)

    @quick_jit
    def admit(params, prompts, lengths, places):
        hidden, rows = prefill(*model.bind_layers(params), prompts, lengths, forward)
        return hidden, write_rows(init_cache(model.config, order, (4,), room, jnp.float32), rows, np.arange(3), places)

    @quick_jit
    def advance(params, cache, tokens, lengths):
        rows = NewTokens(lengths, jnp.ones(4, bool))
        return decode(*model.bind_layers(params), cache, tokens, rows, dense_decoding, forward)

    layers = list_layers(split_kinds(model.config, params["layers"]), order, lambda x, i: x[i])
    unstacked, places = {**params, "layers": layers}, np.array([2, 0, 3])
    hidden, cache = admit(unstacked, tokens[:, : max(lengths) + 2], np.array(lengths), places)
    np.testing.assert_allclose(hidden, [whole[i, n - 1] for i, n in enumerate(lengths)], atol=1e-5, rtol=1e-5)
    step, num_right = 0, 1
    while max(lengths) + step + num_new <= row_len:
        if max(lengths) + step >= cache.length:
            cache = grow_cache(cache, cache.length + 12)
        at = np.zeros(4, np.int32)
        at[places] = np.array(lengths) + step
        new = np.zeros((4, num_new), np.int32)
        new[places] = [tokens[i, n : n + num_new] for i, n in enumerate(at[places])]
        new[:, num_right:] = 95 - new[:, num_right:]
        hidden, cache = advance(unstacked, cache, new, at)
        # What has no room in the cache is not to be read.
        num_read = min(num_right, cache.length - max(lengths) - step)
        expected = [whole[i, n : n + num_read] for i, n in enumerate(at[places])]
        np.testing.assert_allclose(hidden[places, :num_read], expected, atol=1e-5, rtol=1e-5)
        step, num_right = step + num_read, 1 if num_right > 1 else num_new
    assert step > num_new
    places = [count_places(model.config.kinds[name].mixer.window, cache.length) for name in order]
    assert [x.shape[-1] for x in cache.keys] == [x.shape[-2] for x in cache.values] == places


def test_a_window_has_the_places_that_it_needs_and_no_more():
    assert [count_places(None, n) for n in (5, 5000)] == [5, 5000]
    assert [count_places(20, n) for n in (5, 31, 32, 33, 5000)] == [5, 31, 32, 32, 32]
    assert all(window <= count_places(window, 10**6) < window + RING_MULTIPLE for window in range(1, 100))


def test_a_prompt_without_a_slot_changes_nothing():
    model = make_model()
    cache = init_cache(model.config, model.config.order, (2,), 8, jnp.float32)
    rows = init_cache(model.config, model.config.order, (3,), 4, jnp.float32)
    rows = replace(rows, keys=tuple(x + 1 for x in rows.keys), values=tuple(x + 2 for x in rows.values))
    written = write_rows(cache, rows, jnp.array([0, 1, 2]), jnp.array([2, 1, 2]))
    for layer in (*written.keys, *written.values):
        assert not layer[0].any()
    assert all((x[1, :, :, :4] == 1).all() and not x[1, :, :, 4:].any() for x in written.keys)
    assert all((x[1, :, :4] == 2).all() and not x[1, :, 4:].any() for x in written.values)
