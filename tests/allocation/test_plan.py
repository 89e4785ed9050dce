"""Where roles live, which wait in host memory, and what is left idle."""

from dataclasses import replace
from pathlib import Path

import jax
import pytest

from realjax.allocation.allocate import check_experts, make_plan
from realjax.core.layout import Layout, ParallelStrategy
from realjax.dataflow.graph import DataflowGraph, Inference, Train
from realjax.dataflow.run import MovingAverage, RunSpec
from realjax.models.config import AttentionConfig, LayerKind, MoEConfig
from tests.given.sequences import make_loader
from tests.given.specs import TRAIN, make_paths, make_role_spec, make_spec


def infer(name: str, role: str) -> Inference:
    return Inference(name=name, role=role, inputs=("tokens",), head="logprobs")


def train(name: str, role: str) -> Train:
    return replace(TRAIN, name=name, role=role)


def plan_run(*calls: Inference | Train, **changes) -> RunSpec:
    """Returns a run of these calls; `changes` are fields of it."""
    graph = DataflowGraph(calls, frozenset({"tokens", "loss_mask"}))
    roles = {name: make_role_spec(name, Path("nowhere")) for name in graph.roles}
    spec = make_spec(make_paths(Path("nowhere")), graph=graph, roles=roles, loader=make_loader(batch_size=12))
    return replace(spec, **changes)


def plan(spec: RunSpec, layouts: dict[str, Layout]):
    return make_plan(spec, layouts, jax.devices())


def on(first, stop, **sizes):
    return Layout(ParallelStrategy(**sizes or {"dp": stop - first}), tuple(jax.devices()[first:stop]))


DPO = plan_run(infer("ref_inf", "ref"), train("actor_train", "actor"))
LAYOUTS = {"ref_inf": on(0, 8, dp=4, tp=2), "actor_train": on(0, 8, dp=2, tp=4)}


def with_offload(spec: RunSpec, **offload: bool | None) -> RunSpec:
    return replace(spec, roles={name: replace(role, offload=offload.get(name)) for name, role in spec.roles.items()})


def test_a_trained_role_lives_where_it_is_trained_another_where_it_is_first_called():
    spec = plan_run(infer("gen", "actor"), infer("first", "ref"), infer("second", "ref"), train("train", "actor"))
    layouts = {"gen": on(0, 2), "first": on(2, 4), "second": on(4, 6), "train": on(0, 2, tp=2)}
    found = plan(spec, layouts)
    assert found.homes == {"actor": layouts["train"], "ref": layouts["first"]}
    assert found.layouts == layouts
    assert found.idle == "6-7"


@pytest.mark.parametrize(
    ("ref_layout", "offloaded"),
    [(on(0, 8), {"ref"}), (on(3, 4), {"ref"}), (on(4, 8), set()), (on(4, 6, tp=2), set())],
)
def test_a_role_that_shares_a_device_with_another_waits_in_host_memory(ref_layout, offloaded):
    layouts = {"ref_inf": ref_layout, "actor_train": on(0, 4, tp=4)}
    assert plan(DPO, layouts).offloaded == offloaded
    assert plan(with_offload(DPO, ref=True), layouts).offloaded == {"ref"}
    assert plan(with_offload(DPO, ref=False), layouts).offloaded == set()


def test_a_role_alone_or_trained_stays():
    alone = plan_run(infer("one", "ref"), infer("two", "ref"))
    assert plan(alone, {"one": on(0, 4), "two": on(0, 8)}).offloaded == set()
    both = plan_run(train("a", "actor"), train("b", "critic"), infer("v", "critic"))
    assert plan(both, {"a": on(0, 8), "b": on(0, 8), "v": on(0, 4)}).offloaded == set()
    with pytest.raises(ValueError, match="^actor.offload: a role that is trained stays on its devices"):
        plan(with_offload(DPO, actor=True), LAYOUTS)


def test_stages_are_made_equal_in_all_layouts_of_a_role_and_of_the_one_that_follows_it():
    layouts = {"ref_inf": on(0, 1), "actor_train": on(0, 2, pp=2)}
    config = replace(DPO.roles["actor"].config, num_layers=3)
    deep = replace(DPO, roles={name: replace(role, config=config) for name, role in DPO.roles.items()})
    assert plan(deep, layouts).empty_layers == {"ref": 0, "actor": 1}
    followed = replace(deep, averages=(MovingAverage(role="ref", source="actor", eta=0.5),))
    assert plan(followed, layouts).empty_layers == {"ref": 1, "actor": 1}
    with pytest.raises(ValueError, match="^actor_train: 4 pipeline stages, but actor's model has 3 layers"):
        plan(deep, {**layouts, "actor_train": on(0, 4, pp=4)})


def test_stages_that_would_have_other_kinds_of_layer_are_refused():
    layouts = {"ref_inf": on(0, 1), "actor_train": on(0, 2, pp=2)}
    kinds = (LayerKind(name="full"), LayerKind(name="sliding", mixer=AttentionConfig(window=8)))
    config = replace(DPO.roles["actor"].config, num_layers=4, pattern=kinds)
    roles = lambda config: {name: replace(role, config=config) for name, role in DPO.roles.items()}
    assert plan(replace(DPO, roles=roles(config)), layouts).empty_layers == {"ref": 0, "actor": 0}
    with pytest.raises(ValueError, match="^actor_train, actor's model: 2 pipeline stages of 3 layers .* among .1."):
        plan(replace(DPO, roles=roles(replace(config, num_layers=3))), layouts)


def test_devices_share_experts_that_a_model_has():
    six = LayerKind(feed_forward=MoEConfig(num_experts=6, experts_per_token=2, expert_size=4))
    role = make_role_spec("actor", Path("nowhere"))
    check_experts("train", ParallelStrategy(dp=4), role)
    with pytest.raises(ValueError, match="^train: 2 devices .* but actor's model has no experts; .*size of 1$"):
        check_experts("train", ParallelStrategy(dp=4, ep=2), role)
    role = replace(role, config=replace(role.config, pattern=(six,)))
    check_experts("train", ParallelStrategy(dp=4, ep=2), role)
    with pytest.raises(ValueError, match="has 6 experts, which do not divide over them; .* a divisor of that$"):
        check_experts("train", ParallelStrategy(dp=4, ep=4), role)


def test_a_batch_must_share_out_over_devices_and_micro_batches():
    spec = replace(DPO, loader=make_loader(batch_size=4))
    with pytest.raises(ValueError, match="^dataset.train_bs_n_seqs: 4 sequences cannot be divided over 8 data-para"):
        plan(spec, {"ref_inf": on(0, 1), "actor_train": on(0, 8)})


def test_the_description_says_where_each_call_runs_and_how_its_parameters_get_there():
    ref, actor, batches = plan(DPO, LAYOUTS).describe().splitlines()
    assert ref == "ref_inf      d4p1m2 on 0-7  ref from host memory"
    assert actor == "actor_train  d2p1m4 on 0-7  actor at home"
    assert batches == "batches: 4 x 32 rows x tokens"
    spec = plan_run(infer("gen", "actor"), train("train", "actor"))
    gen, home, _, idle = plan(spec, {"gen": on(0, 4), "train": on(0, 6, dp=6)}).describe().splitlines()
    assert gen == "gen    d4p1m1 on 0-3  actor from its home d6p1m1 on 0-5"
    assert home.endswith("actor at home") and idle == "idle devices: 6-7"
