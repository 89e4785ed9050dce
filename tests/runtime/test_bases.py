"""Roles with adapters beside weights that they have in common: what is there once, what moves, what is drawn."""

import jax
import numpy as np
import pytest

from realjax.core.trees import Tree, flatten_paths, num_bytes
from realjax.engine.state import TrainState
from realjax.hf.adapters import merge_adapters
from realjax.reshard.apply import reshard
from realjax.runtime.executor import Executor
from tests.given.compare import assert_bitwise_equal, assert_close_in_norm
from tests.given.models import quick_compiles
from tests.given.runs import Given, build_rl_spec, load_executor, write_given

# The critic begins as its actor, as does the reference: all of one checkpoint.
APART = {
    "n_gpus_per_node": 4,
    "allocation_mode": "manual",
    "actor_gen.parallel.data_parallel_size": 2,
    "actor_gen.device_mesh": "NODE01:2,3",
    "actor_train.parallel.model_parallel_size": 2,
    "actor_train.device_mesh": "NODE01:0,1",
    "critic_train.parallel.model_parallel_size": 2,
    "critic_train.device_mesh": "NODE01:0,1",
    "critic_inf.parallel.model_parallel_size": 2,
    "critic_inf.device_mesh": "NODE01:0,1",
    "ref_inf.parallel.model_parallel_size": 2,
    "ref_inf.device_mesh": "NODE01:0,1",
    "rew_inf.parallel.data_parallel_size": 4,
}


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Given:
    return write_given(tmp_path_factory.mktemp("given"))


def make(given: Given, root, merge: bool = False) -> Executor:
    apart = {name.replace(".", "__"): value for name, value in APART.items()}
    lora = {f"{name}__lora__rank": 4 for name in ("actor", "critic")}
    return load_executor(build_rl_spec(given, root, "ppo", **apart, **lora, actor__lora__merge=merge))


@pytest.fixture(scope="module")
def stepped(given, tmp_path_factory) -> dict[bool, tuple[Executor, Tree, list[float]]]:
    """For weights applied and merged: the executor after two steps, adapters before, and bytes moved by a call."""
    found = {}
    with quick_compiles():
        for merge in (False, True):
            executor = make(given, tmp_path_factory.mktemp("run"), merge)
            before = jax.tree.map(np.asarray, executor.own_params("actor"))
            for step in range(2):
                executor.step(executor_batch(executor, step), step)
            jax.block_until_ready(executor.own_params("actor"))
            found[merge] = executor, before, executor.timeline.of_step
    return found


def executor_batch(executor: Executor, step: int):
    return executor.plan.loader.batch(step)


def base_leaves(executor: Executor, role: str) -> dict[str, object]:
    return flatten_paths(executor.bases.at_home(executor.roles[role]))


def test_reference_and_critic_have_no_copy_of_their_own(stepped):
    executor, *_ = stepped[False]
    actor, ref, critic = (base_leaves(executor, role) for role in ("actor", "ref", "critic"))
    assert executor.states["ref"] == {} and ref.keys() == actor.keys()
    assert all(ref[path] is actor[path] for path in ref)
    assert critic.keys() == actor.keys() - {"head/kernel"}
    assert all(critic[path] is actor[path] for path in critic)
    assert set(flatten_paths(executor.own_params("critic"))) >= {"head/kernel", "layers/attn/q/lora_a"}


@pytest.mark.parametrize("merge", [False, True])
def test_only_adapters_move_after_the_first_step(merge, stepped):
    executor, *_ = stepped[merge]
    moved = [
        {event.name: event.bytes_moved for event in executor.timeline.of_step(step)}["actor_gen"] for step in range(2)
    ]
    adapters = num_bytes(executor.own_params("actor"))
    whole = num_bytes(executor.roles["actor"].model.take_frozen(executor.roles["actor"].model.abstract))
    # To two devices whole copies of all: adapters, which are there in halves, and at first the base.
    assert moved[1] <= 2 * adapters < moved[0]
    assert moved[0] >= whole


@pytest.mark.parametrize("merge", [False, True])
def test_training_changes_adapters_and_not_what_they_lie_beside(merge, stepped, given):
    executor, before, _ = stepped[merge]
    after = flatten_paths(executor.own_params("actor"))
    assert all((np.asarray(leaf) != flatten_paths(before)[path]).any() for path, leaf in after.items())
    assert isinstance(executor.states["actor"], TrainState)
    fresh = make(given, given.folder / "fresh")
    assert_bitwise_equal(executor.bases.at_home(executor.roles["actor"]), fresh.bases.at_home(fresh.roles["actor"]))


def test_merged_weights_are_weights_and_adapters_applied(stepped):
    executor, *_ = stepped[True]
    role, layout = executor.roles["actor"], executor.plan.layouts["actor_gen"]
    own = executor.own_params("actor")
    merged, _ = executor.bases.merge(role, own, layout, lambda path, leaf: leaf)
    whole, _ = executor.bases.bring(role, own, layout)
    frozen = jax.tree.map(lambda x: x.copy(), role.model.take_frozen(whole))
    lora = role.model.config.lora
    assert lora is not None
    assert_close_in_norm(
        merged, jax.tree.map(np.asarray, merge_adapters(frozen, role.model.take_trained(whole), lora)), 1e-6
    )


def test_adapters_go_from_layout_to_layout_bitwise(stepped):
    executor, *_ = stepped[False]
    role, own = executor.roles["actor"], executor.own_params("actor")
    there = role.take_own(role.shardings(executor.plan.layouts["actor_gen"]))
    moved, report = reshard(own, there)
    assert_bitwise_equal(moved, own)
    back, _ = reshard(moved, jax.tree.map(lambda leaf: leaf.sharding, own))
    assert_bitwise_equal(back, own)
    assert report.bytes_moved < 3 * num_bytes(own)
