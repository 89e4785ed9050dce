import numpy as np
import pytest

from realjax.hf.families import FAMILIES
from realjax.hf.rules import CRITIC_HEAD_NAME, Rule, check_tensors, hf_tensors, leaf_rules
from realjax.models.config import ModelConfig
from tests.hf.tiny import random_index

ALL_RULES = {rule.path: rule for family in FAMILIES.values() for rule in family.rules}
CONFIG = {"family": "llama", "vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_q_heads": 4, "num_kv_heads": 2}
CONFIG |= {"head_dim": 8, "ffn_size": 48, "max_positions": 64}


def random_leaf(rule: Rule, rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal([int(rng.integers(2, 6)) for _ in rule.dims.split(" -> ")[1].split()])


@pytest.mark.parametrize("rule", ALL_RULES.values(), ids=ALL_RULES.keys())
def test_a_rule_is_invertible(rule):
    x = random_leaf(rule, np.random.default_rng(0))
    hf = rule.to_hf(x)
    assert hf.shape == rule.hf_shape(x.shape)
    np.testing.assert_array_equal(rule.from_hf(hf, x.shape), x)


@pytest.mark.parametrize("rule", ALL_RULES.values(), ids=ALL_RULES.keys())
def test_a_slice_read_through_a_rule_is_the_slice_of_the_whole_and_reads_no_more_than_its_rows_and_columns(rule):
    rng = np.random.default_rng(1)
    for _ in range(20):
        x = random_leaf(rule, rng)
        hf, index = rule.to_hf(x), random_index(rng, x.shape)
        read_sizes = []

        def read(name, window, hf=hf, read_sizes=read_sizes):
            read_sizes.append(hf[window].size)
            return hf[window]

        part = rule.read(read, "any", x.shape, index)
        np.testing.assert_array_equal(part, x[index])
        heads_whole = [s if dim in {g[0] for g in rule.groups} else slice(None) for dim, s in enumerate(index)]
        assert read_sizes == [x[tuple(heads_whole)].size]


def test_head_order_is_that_of_a_reshape_of_the_output_rows():
    rule = ALL_RULES["layers/attn/q/kernel"]
    hf = np.arange(6 * 5).reshape(6, 5)  # two heads of three rows
    q = rule.from_hf(hf, (5, 2, 3))
    np.testing.assert_array_equal(q[4, 1, 2], hf[1 * 3 + 2, 4])


def test_tensors_come_once_each_and_layer_by_layer():
    shapes = {"embed/table": (64, 32), "layers/mlp/up/kernel": (2, 32, 48), "layers/mlp_norm/scale": (2, 32)}
    rules = leaf_rules(FAMILIES["llama"], ModelConfig(**CONFIG), shapes)
    assert [(tensor.name, tensor.shape) for tensor in hf_tensors(rules, shapes)] == [
        ("model.embed_tokens.weight", (64, 32)),
        ("model.layers.0.post_attention_layernorm.weight", (32,)),
        ("model.layers.0.mlp.up_proj.weight", (48, 32)),
        ("model.layers.1.post_attention_layernorm.weight", (32,)),
        ("model.layers.1.mlp.up_proj.weight", (48, 32)),
    ]


def test_a_critic_head_has_a_name_of_its_own():
    rules = leaf_rules(FAMILIES["llama"], ModelConfig(**CONFIG).as_critic(), {"head/kernel": (32, 1)})
    assert rules["head/kernel"].name == CRITIC_HEAD_NAME


def test_a_leaf_without_a_rule_is_named():
    with pytest.raises(ValueError, match="family 'llama': no rule for 'layers/router/kernel'"):
        leaf_rules(FAMILIES["llama"], ModelConfig(**CONFIG), {"layers/router/kernel": (2, 32, 4)})


def test_missing_left_over_and_misshapen_tensors_are_named():
    check_tensors("x", {"a": (1,)}, {"a": (1,), "model.layers.0.self_attn.rotary_emb.inv_freq": (4,)})
    with pytest.raises(ValueError, match="x: the checkpoint lacks 2 tensors: 'b', 'c'"):
        check_tensors("x", {"a": (1,), "b": (1,), "c": (1,)}, {"a": (1,)})
    with pytest.raises(ValueError, match="x: nothing in the model takes 'b'"):
        check_tensors("x", {"a": (1,)}, {"a": (1,), "b": (1,)})
    with pytest.raises(ValueError, match=r"tensor 'a' has shape \[2\], the model needs \[1\]"):
        check_tensors("x", {"a": (1,)}, {"a": (2,)})
