"""What the planner sees of a run."""

from dataclasses import replace

import numpy as np
import pytest

from realjax.allocation.candidates import find_fault
from realjax.allocation.run_workload import read_workload
from realjax.allocation.workload import Lengths, ModelShape
from realjax.core.generation_config import GenerationConfig
from realjax.core.layout import ParallelStrategy
from realjax.core.trees import map_paths, num_params
from realjax.dataflow.graph import DataflowGraph, Generate
from realjax.models.build import build_model
from realjax.models.config import AttentionConfig, LayerKind, MoEConfig
from tests.given.models import CAPPED, FAMILY_CONFIGS, FULL, LEARNED, make_model
from tests.given.runs import LONGEST, build_rl_spec, build_spec, make_options


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
@pytest.mark.parametrize("is_critic", [False, True])
def test_a_shape_counts_the_parameters(family, is_critic):
    config = FAMILY_CONFIGS[family].as_critic() if is_critic else FAMILY_CONFIGS[family]
    model, shape, sizes = build_model(config), ModelShape.of(config), dict[str, int]()
    assert shape.num_params == model.num_params
    map_paths(lambda path, leaf: sizes.update({path: leaf.size}), model.abstract["layers"])
    # The gate of a feed-forward beside experts is left out too.
    of_kernels = sum(size for path, size in sizes.items() if path.endswith("kernel") and "shared/router" not in path)
    assert of_kernels == shape.num_layers * (shape.layer_params - 2 * shape.hidden_size)


EXPERTS = MoEConfig(
    num_experts=4, experts_per_token=2, expert_size=8, router_bias=True, has_offset=True, bias=True, shared_size=12,
    shared_gate=True,
)  # fmt: skip
MIXED = {"pattern": (LayerKind(name="dense"), LayerKind(name="sparse", feed_forward=EXPERTS))}


@pytest.mark.parametrize("changes", [{}, {"tied": True}, {"is_critic": True}, FULL, LEARNED, CAPPED, MIXED], ids=str)
def test_a_shape_counts_every_leaf_that_a_model_can_have(changes):
    model = make_model(**changes)
    assert ModelShape.of(model.config).num_params == model.num_params == num_params(model.abstract)


def test_a_shape_says_how_far_layers_look_back():
    near = LayerKind(name="near", mixer=AttentionConfig(window=20))
    patterns = ((LayerKind(),), (near,), (near, LayerKind()))
    shapes = [ModelShape.of(make_model(pattern=pattern).config) for pattern in patterns]
    assert [shape.windows for shape in shapes] == [(None,), (20,), (20, None)]
    assert [shape.mean_places(10.5) for shape in shapes] == [10.5] * 3
    assert [shape.mean_places(100.5) for shape in shapes] == [100.5, 32, 66.25]


def test_lengths_add_up_as_independent_ones_do():
    rng = np.random.default_rng(0)
    some, more = rng.integers(1, 50, 40), rng.integers(1, 50, 30)
    pairs = (some[:, None] + more[None]).reshape(-1)
    added, measured = Lengths.measure(some) + Lengths.measure(more), Lengths.measure(pairs)
    assert (added.mean, added.mean_square) == pytest.approx((measured.mean, measured.mean_square))
    assert added.longest == measured.longest


def test_the_workload_of_ppo(given, tmp_path):
    spec = build_rl_spec(given, tmp_path, actor_train__n_mbs=2, actor__zero_stage=3)
    work = read_workload(spec, "cpu", answers=Lengths.all(5))
    calls = {call.name: call for call in work.calls}
    assert {name: call.kind for name, call in calls.items()} == {
        "actor_gen": "generate",
        "rew_inf": "inference",
        "ref_inf": "inference",
        "critic_inf": "inference",
        "actor_train": "train",
        "critic_train": "train",
    }
    assert calls["actor_train"].after == ("actor_gen", "rew_inf", "ref_inf", "critic_inf")
    assert calls["actor_train"].num_updates == 4 and calls["actor_train"].num_sequences == 8
    assert calls["actor_train"].lengths.mean == calls["actor_gen"].lengths.mean == calls["actor_gen"].prompts.mean + 5
    assert calls["actor_train"].fixed.micro_batches.count == 2 and calls["ref_inf"].fixed.micro_batches is None
    # The options of these runs say that nothing is computed again.
    assert (calls["actor_train"].fixed.remat, calls["actor_train"].fixed.zero_stage) == (False, 3)
    assert calls["critic_train"].fixed.zero_stage is None
    assert not calls["rew_inf"].scores_vocab and calls["ref_inf"].scores_vocab
    assert work.home_call("actor").name == "actor_train" and work.home_call("ref").name == "ref_inf"
    assert [name for name, role in work.roles.items() if role.is_trained] == ["actor", "critic"]


@pytest.mark.parametrize(
    "changes",
    [{"records_routes": True}, {"config": GenerationConfig(prompt_lookup_num_tokens=2)}],
    ids=["routes", "lookup"],
)
def test_what_records_routes_or_proposes_tokens_stays_on_one_stage(given, tmp_path, changes):
    spec = build_rl_spec(given, tmp_path)
    record = lambda call: replace(call, **changes) if isinstance(call, Generate) else call
    graph = DataflowGraph(tuple(map(record, spec.graph.calls)), spec.graph.dataset_keys)
    generate, *others = read_workload(replace(spec, graph=graph), "cpu").calls
    assert find_fault(generate, ParallelStrategy(pp=2)) == "its layers can be in [1] pipeline stages, not in 2"
    assert all(find_fault(call, ParallelStrategy(pp=2)) is None for call in others)


def test_rows_are_those_of_the_loader(given, tmp_path):
    spec = build_spec("sft", make_options("sft", given, tmp_path, dataset__train_path=given.train))
    (call,) = read_workload(spec, "cpu").calls
    rows, row_len = call.pack_fn(1)
    assert row_len == spec.loader.shapes.row_len >= LONGEST
    assert rows == spec.loader.shapes.num_rows[:8].mean()
    assert call.pack_fn(4)[0] % 4 == 0
