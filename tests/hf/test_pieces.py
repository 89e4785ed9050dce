import numpy as np
import pytest

from realjax.hf.families import FAMILIES
from realjax.hf.pieces import (
    CRITIC_HEAD_NAME,
    check_tensors,
    find_pieces,
    group_by_leaf,
    list_pieces,
    list_tensors,
    make_tensor,
    read_leaf,
)
from realjax.hf.rules import Rule
from realjax.models.config import ModelConfig
from tests.given.checkpoints import random_index

CONFIG = {"family": "llama", "vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_q_heads": 4, "num_kv_heads": 2}
CONFIG |= {"head_dim": 8, "ffn_size": 48, "max_positions": 64}
QKV = "model.layers.{layer}.self_attn.qkv_proj.weight"
UP = Rule("layers/mlp/up/kernel", "model.layers.{layer}.mlp.up_proj.weight", "F D -> D F")
EXPERT_UP = Rule("layers/moe/up/kernel", "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight", "F D -> E D F")
# Layers of two kinds, one with experts, of which the second stack ends in an empty layer.
MIXED = (
    Rule("embed/table", "embed.weight", "V D -> V D"),
    Rule("layers/attn/q/kernel", QKV, "(([N] + K + K) H) D -> D N H"),
    Rule("layers/attn/k/kernel", QKV, "((N + [K] + K) H) D -> D K H"),
    Rule("layers/attn/v/kernel", QKV, "((N + K + [K]) H) D -> D K H"),
    EXPERT_UP,
    UP,
    Rule("layers/mlp/gates/kernel", "model.layers.{layer}.mlp.first_proj.weight", "F D -> D ([1] + 1) F"),
    Rule("layers/mlp/gates/kernel", "model.layers.{layer}.mlp.second_proj.weight", "F D -> D (1 + [1]) F"),
    Rule("norm/scale", "norm.weight", "D -> D"),
)
MIXED_LAYERS = {"layers/even": (0, 2), "layers/odd": (1, 3, None)}
MIXED_SHAPES = {
    "embed/table": (7, 6),
    "layers/even/attn/q/kernel": (2, 6, 4, 2),
    "layers/even/attn/k/kernel": (2, 6, 2, 2),
    "layers/even/attn/v/kernel": (2, 6, 2, 2),
    "layers/even/moe/up/kernel": (2, 3, 6, 4),
    "layers/odd/mlp/up/kernel": (3, 6, 5),
    "layers/odd/mlp/gates/kernel": (3, 6, 2, 5),
    "norm/scale": (6,),
}
MIXED_SIZES = {"N": 4, "K": 2}


def test_tensors_come_once_each_and_layer_by_layer():
    shapes = {"embed/table": (64, 32), "layers/mlp/up/kernel": (2, 32, 48), "layers/mlp_norm/scale": (2, 32)}
    tensors = list_tensors(find_pieces(FAMILIES["llama"], ModelConfig(**CONFIG), shapes))
    assert [(tensor.name, tensor.shape) for tensor in tensors] == [
        ("model.embed_tokens.weight", (64, 32)),
        ("model.layers.0.post_attention_layernorm.weight", (32,)),
        ("model.layers.0.mlp.up_proj.weight", (48, 32)),
        ("model.layers.1.post_attention_layernorm.weight", (32,)),
        ("model.layers.1.mlp.up_proj.weight", (48, 32)),
    ]


def test_layers_of_several_kinds_come_in_the_checkpoints_order_expert_by_expert():
    tensors = list_tensors(list_pieces(MIXED, MIXED_SHAPES, MIXED_LAYERS, MIXED_SIZES))
    even = lambda n: [f"{n}.self_attn.qkv_proj", *(f"{n}.mlp.experts.{e}.up_proj" for e in range(3))]
    odd = lambda n: [f"{n}.mlp.{part}_proj" for part in ("up", "first", "second")]
    layers = [f"model.layers.{name}.weight" for name in (*even(0), *odd(1), *even(2), *odd(3))]
    assert [tensor.name for tensor in tensors] == ["embed.weight", *layers, "norm.weight"]
    shapes = {tensor.name.split(".", 3)[-1]: tensor.shape for tensor in tensors}
    assert shapes["self_attn.qkv_proj.weight"] == (16, 6) and shapes["mlp.experts.2.up_proj.weight"] == (4, 6)


def test_leaves_survive_the_way_to_tensors_and_back_in_any_slice_and_empty_layers_are_zero():
    rng = np.random.default_rng(0)
    leaves = {path: rng.standard_normal(shape).astype(np.float32) for path, shape in MIXED_SHAPES.items()}
    pieces = list_pieces(MIXED, MIXED_SHAPES, MIXED_LAYERS, MIXED_SIZES)
    dtype = np.dtype(np.float32)
    fetch = lambda piece: leaves[piece.path][piece.index]
    tensors = {tensor.name: make_tensor(tensor, fetch, dtype) for tensor in list_tensors(pieces)}
    for path, leaf in leaves.items():
        if path.startswith("layers/odd"):
            leaf[2:] = 0
        parts = group_by_leaf(pieces)[path]
        for index in [tuple(slice(0, n) for n in leaf.shape), *(random_index(rng, leaf.shape) for _ in range(20))]:
            read = read_leaf(parts, lambda name, window: tensors[name][window], index, dtype)
            np.testing.assert_array_equal(read, leaf[index], err_msg=path)


def test_of_a_part_of_a_leaf_only_its_layers_experts_rows_and_columns_are_read():
    pieces = group_by_leaf(list_pieces(MIXED, MIXED_SHAPES, MIXED_LAYERS, MIXED_SIZES))
    read: list[tuple[str, list[int]]] = []

    def read_fn(name, window):
        read.append((name, [s.stop - s.start for s in window]))
        return np.zeros([s.stop - s.start for s in window], np.float32)

    dtype = np.dtype(np.float32)
    read_leaf(pieces["layers/even/moe/up/kernel"], read_fn, (slice(1, 2), slice(1, 3), slice(0, 3), slice(2, 4)), dtype)
    names = [f"model.layers.2.mlp.experts.{expert}.up_proj.weight" for expert in (1, 2)]
    assert read == [(name, [2, 3]) for name in names]
    read.clear()
    read_leaf(pieces["layers/even/attn/v/kernel"], read_fn, (slice(0, 1), slice(0, 6), slice(1, 2), slice(0, 2)), dtype)
    assert read == [("model.layers.0.self_attn.qkv_proj.weight", [2, 6])]
    read.clear()
    read_leaf(
        pieces["layers/odd/mlp/gates/kernel"], read_fn, (slice(1, 3), slice(0, 6), slice(1, 2), slice(0, 5)), dtype
    )
    assert read == [("model.layers.3.mlp.second_proj.weight", [5, 6])]


def test_a_critic_head_has_a_name_of_its_own():
    pieces = find_pieces(FAMILIES["llama"], ModelConfig(**CONFIG).as_critic(), {"head/kernel": (32, 1)})
    assert [(piece.name, piece.dims.tensor_shape) for piece in pieces] == [(CRITIC_HEAD_NAME, (1, 32))]


def test_a_leaf_without_a_rule_is_named():
    with pytest.raises(ValueError, match="family 'llama': no rule for 'layers/router/kernel'"):
        find_pieces(FAMILIES["llama"], ModelConfig(**CONFIG), {"layers/router/kernel": (2, 32, 4)})


@pytest.mark.parametrize(
    ("rules", "shapes", "message"),
    [
        ([UP], {"layers/mlp/up/kernel": (2, 6)}, r"rule for '.*up_proj.weight' does not fit 'layers/mlp/up/kernel': "),
        ([UP], {"layers/mlp/up/kernel": (3, 6, 5)}, "'layers/mlp/up/kernel' has 3 layers, the model config 2"),
        ([UP, UP], {"layers/mlp/up/kernel": (2, 6, 5)}, "the rules cover 120 of the 60 numbers of 'layers/mlp/up"),
        (MIXED[6:7], {"layers/mlp/gates/kernel": (2, 6, 2, 5)}, "the rules cover 60 of the 120 numbers of 'layers/mlp"),
    ],
)
def test_rules_that_do_not_make_the_leaf_are_named(rules, shapes, message):
    with pytest.raises(ValueError, match=message):
        list_pieces(rules, shapes, {"layers": (0, 1)}, MIXED_SIZES)


@pytest.mark.parametrize("rules", [MIXED[1:3], [*MIXED[1:3], Rule("layers/attn/v/kernel", QKV, MIXED[2].dims)]])
def test_a_tensor_of_which_a_part_is_missing_or_there_twice_is_named(rules):
    shapes = {rule.path: (2, 6, 4 if "/q/" in rule.path else 2, 2) for rule in rules}
    with pytest.raises(ValueError, match=r"tensor 'model.layers.0.self_attn.qkv_proj.weight': its rules cover .* from"):
        list_tensors(list_pieces(rules, shapes, {"layers": (0, 1)}, MIXED_SIZES))


def test_missing_left_over_and_misshapen_tensors_are_named():
    shapes = {"layers/moe/up/kernel": (1, 2, 6, 5)}
    tensors = list_tensors(list_pieces([EXPERT_UP], shapes, {"layers": (0,)}, {}))
    name = "model.layers.0.mlp.experts.{}.up_proj.weight"
    found = {name.format(i): (5, 6) for i in range(2)}
    check_tensors("x", tensors, {**found, "model.layers.0.self_attn.rotary_emb.inv_freq": (4,)})
    with pytest.raises(ValueError, match=f"x: the checkpoint lacks 2 tensors: '{name.format(0)}', '{name.format(1)}'"):
        check_tensors("x", tensors, {})
    with pytest.raises(ValueError, match=f"x: nothing in the model takes '{name.format(2)}'"):
        check_tensors("x", tensors, {**found, name.format(2): (5, 6)})
    message = rf"tensor '{name.format(1)}' has shape \[6, 5\], the model needs \[5, 6\] for its 'layers/moe/up/kernel'"
    with pytest.raises(ValueError, match=message):
        check_tensors("x", tensors, {**found, name.format(1): (6, 5)})
