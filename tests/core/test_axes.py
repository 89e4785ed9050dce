import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from realjax.core.axes import (
    generate_rules,
    inference_rules,
    make_constrain,
    optimizer_rules,
    resolve,
    train_rules,
    tree_shardings,
)
from realjax.core.layout import ParallelStrategy
from realjax.core.trees import flatten_paths
from realjax.models.build import build_model
from realjax.models.config import list_cuts
from tests.given.models import FAMILY_CONFIGS, FULL, make_layout, make_model, random_tree

TABLES = {
    "train": train_rules,
    "inference": inference_rules,
    "generate": generate_rules,
    "optimizer": optimizer_rules,
}
LAYOUTS = [
    *({}, {"dp": 8, "zero": 3}, {"dp": 2, "tp": 4, "zero": 1, "sp": True}, {"pp": 2, "dp": 2, "tp": 2}),
    *({"dp": 4, "ep": 2, "zero": 1}, {"dp": 4, "ep": 2, "tp": 2, "zero": 3}),
]


def num_shards(name: str, size: int, strategy: ParallelStrategy, table: str) -> int:
    """Returns into how many parts the design splits a parameter's dim."""
    tp, pp = strategy.tp, strategy.pp
    zero = strategy.zero_stage >= (1 if table == "optimizer" else 3)
    return {
        "layers": pp,
        "vocab": tp * pp if size % (tp * pp) == 0 else tp,
        "embed": strategy.dp if zero else 1,
        "experts": strategy.ep,
        "expert_embed": strategy.dp // strategy.ep if zero else 1,
        "q_heads": tp,
        "kv_heads": tp if size % tp == 0 else 1,
        "ffn": tp,
        "head_dim": 1,
        "router": 1,
        "norm": 1,
        "positions": 1,
        "score": 1,
    }[name]


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("family", [*FAMILY_CONFIGS, "critic", "everything"])
def test_every_parameter_of_every_family_has_a_place_in_every_table(family, layout, table):
    if family == "everything":
        model = make_model(**FULL)
    else:
        model = build_model(FAMILY_CONFIGS["llama"].as_critic() if family == "critic" else FAMILY_CONFIGS[family])
    layout = make_layout(**layout)
    if layout.strategy.pp not in list_cuts(model.config.order):
        pytest.skip("its layers do not make these stages, which is refused")
    rules = TABLES[table](layout.strategy)
    names = flatten_paths(model.axes)
    shardings = flatten_paths(tree_shardings(model.axes, model.abstract, rules, layout))
    for path, leaf in flatten_paths(model.abstract).items():
        split = [num_shards(name, size, layout.strategy, table) for name, size in zip(names[path], leaf.shape)]
        expected = tuple(size // shards for size, shards in zip(leaf.shape, split))
        assert shardings[path].shard_shape(leaf.shape) == expected, path


def test_tables_split_what_they_promise():
    strategy = make_layout(dp=2, tp=2, sp=True).strategy
    assert train_rules(strategy)["residual_time"] == "tensor"
    assert generate_rules(strategy)["residual_time"] is None  # one token a row
    assert train_rules(make_layout(tp=2).strategy)["residual_time"] is None
    by_stage = {
        stage: (train_rules(s)["embed"], optimizer_rules(s)["embed"])
        for stage in range(4)
        if (s := make_layout(dp=2, zero=stage).strategy)
    }
    every = ("data", "expert")
    assert by_stage == {0: (None, None), 1: (None, every), 2: (None, every), 3: (every, every)}


@pytest.mark.parametrize(
    "num_kv_heads, tp, expected", [(2, 2, P(None, "tensor")), (2, 4, P()), (4, 4, P(None, "tensor")), (3, 2, P())]
)
def test_kv_heads_are_split_where_they_divide_and_whole_where_not(num_kv_heads, tp, expected):
    layout = make_layout(tp=tp)
    names = ("embed", "kv_heads", "head_dim")
    assert resolve(names, (32, num_kv_heads, 8), train_rules(layout.strategy), layout, "k") == expected


@pytest.mark.parametrize(
    "names, shape, message",
    [
        (("embed", "heads"), (4, 4), r"^w: dim 1 has the unknown axis name 'heads'; known: act_embed, .*vocab"),
        (("embed",), (4, 4), r"^w: 1 axis names \('embed',\) for shape \(4, 4\); name every dim"),
        (("ffn", "vocab"), (4, 4), r"^w: mesh axis 'tensor' is used for two dims of .*; change the rule of 'vocab'"),
        (
            ("embed", "q_heads"),
            (4, 6),
            r"^w: dim 1 \('q_heads'\) of size 6 does not divide over mesh axis 'tensor' of size 4; "
            r"use a model_parallel_size among \[1, 2, 3, 6\]",
        ),
        (("embed",), (5,), r"'embed'\) of size 5 .* data_parallel_size among \[1, 5\] or zero_stage=0"),
        (("rows",), (5,), r"does not divide over mesh axis 'data' x 'expert' of size 4; use a data_parallel"),
        (("experts",), (3,), r"axis 'expert' of size 2; use an expert_parallel_size among \[1, 3\]"),
    ],
)
def test_the_resolver_names_parameter_dim_size_and_axis(names, shape, message):
    layout = make_layout(dp=4, ep=2, zero=3) if {"rows", "experts"} & {*names} else make_layout(dp=2, tp=4, zero=3)
    with pytest.raises(ValueError, match=message):
        resolve(names, shape, train_rules(layout.strategy), layout, "w")


def test_layers_that_do_not_divide_over_pipe_are_refused_by_name():
    model, layout = make_model(num_layers=3), make_layout(pp=2)
    with pytest.raises(ValueError, match=r"layers/attn.* dim 0 \('layers'\) of size 3 .* pipeline_parallel_size"):
        tree_shardings(model.axes, model.abstract, train_rules(layout.strategy), layout)


def test_parameters_survive_any_placement():
    model = make_model(**FULL)
    params = random_tree(model)
    for kwargs in LAYOUTS:
        layout = make_layout(**kwargs)
        shardings = tree_shardings(model.axes, model.abstract, optimizer_rules(layout.strategy), layout)
        jax.tree.map(np.testing.assert_array_equal, jax.device_put(params, shardings), params)


def test_constrain_splits_activations_and_is_the_identity_on_one_device():
    x = np.zeros((4, 8, 6), np.float32)
    layout = make_layout(dp=2, tp=2, sp=True)
    constrain = make_constrain(train_rules(layout.strategy), layout)
    split = jax.jit(lambda x: constrain(x, ("rows", "residual_time", "act_embed")))(x)
    assert split.sharding.is_equivalent_to(layout.sharding("data", "tensor"), 3)
    with pytest.raises(ValueError, match=r"activation .* dim 1 \('residual_time'\) of size 5 does not divide"):
        jax.eval_shape(lambda x: constrain(x[:, :5], ("rows", "residual_time", "act_embed")), x)
    alone = make_layout()
    assert make_constrain(train_rules(alone.strategy), alone)(x, ("any", "name")) is x
