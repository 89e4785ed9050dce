import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.models.stacks import Layer, PerRow, find_cycles, list_layers, number_layers, scan_layers

PER_ROW = PerRow((), jnp.ones((1, 4), jnp.int32))
CYCLES = {
    "aaaa": [("a", 4)],
    "abab": [("ab", 2)],
    "ababa": [("ab", 2), ("a", 1)],
    "aabaabaa": [("aab", 2), ("a", 2)],
    "aabb": [("a", 2), ("b", 2)],
    "a": [("a", 1)],
    "abc": [("a", 1), ("b", 1), ("c", 1)],
}


@pytest.mark.parametrize(("order", "expected"), list(CYCLES.items()))
def test_a_pattern_and_its_repeats_are_a_cycle_and_what_is_left_are_runs(order, expected):
    assert [("".join(cycle), times) for cycle, times in find_cycles(tuple(order))] == expected


@pytest.mark.parametrize("order", list(CYCLES))
@pytest.mark.parametrize("unroll", [False, True])
def test_each_layer_runs_once_and_in_its_place_and_terms_are_summed(order, unroll):
    stacks = {kind: np.arange(order.count(kind)) + 10.0 * ord(kind) for kind in set(order)}

    def make_block(kind):
        # Neither commutes with itself: another order gives other numbers.
        return lambda layer, x, per_row: (jnp.sin(x * layer.params["w"] + 1), {"all": x.sum(), kind: x.sum()})

    x, expected = jnp.array([0.1, 0.2]), {}
    layers = list_layers({kind: {"w": stack} for kind, stack in stacks.items()}, tuple(order), lambda x, i: x[i])
    assert [float(layer["w"]) for layer in layers] == [stacks[name][i] for name, i in number_layers(tuple(order))]
    for kind, layer in zip(order, layers):
        for name in ("all", kind):
            expected[name] = expected.get(name, 0) + float(x.sum())
        x = jnp.sin(x * layer["w"] + 1)
    layers = {kind: Layer({"w": jnp.array(stack)}) for kind, stack in stacks.items()}
    blocks = {kind: make_block(kind) for kind in stacks}
    run = jax.jit(lambda x: scan_layers(blocks, tuple(order), layers, x, PER_ROW, unroll=unroll))
    found, terms = run(jnp.array([0.1, 0.2]))
    np.testing.assert_allclose(found, x, rtol=1e-3)
    assert {name: float(term) for name, term in terms.items()} == pytest.approx(expected, rel=1e-3)
