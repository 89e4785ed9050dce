"""What a call takes of its devices' memory is counted as the arrays lie, and shows what offloading saves."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.algorithms.dpo import DPOParameters, make_dpo_loss
from realjax.algorithms.sft import SFT_LOSS
from realjax.dataflow.graph import DataflowGraph, Inference, Train
from realjax.engine.compiled import Compiled, CompileLog
from realjax.reshard.apply import on_host
from realjax.runtime.memory import bytes_held_beside, device_bytes, measured_peak_bytes
from realjax.runtime.roles import Role
from tests.given.compare import device_bytes as bytes_of_shards
from tests.given.models import make_layout, make_model, place_params, random_tree
from tests.given.sequences import make_examples, pack_in_order
from tests.given.specs import make_executor, make_role, make_state

MODEL = make_model(vocab_size=512, hidden_size=96, head_dim=12, ffn_size=256)
LAYOUT = make_layout(dp=2, zero=2)
REF_LAYOUT = make_layout(dp=2)
KEYS = frozenset({"tokens", "loss_mask", "pair_weight"})
BEFORE = Inference(name="ref", role="ref", inputs=("tokens",), outputs=("ref_logprobs",), head="logprobs")
DPO = Train(
    name="train",
    role="default",
    inputs=("tokens", "loss_mask", "pair_weight", "ref_logprobs"),
    loss=make_dpo_loss(DPOParameters()),
)
SFT = Train(name="train", role="default", inputs=("tokens", "loss_mask"), loss=SFT_LOSS)


def make_trees() -> list[Any]:
    """Returns parameters split, replicated and in host memory, on the same and on other devices."""
    params = random_tree(MODEL)
    trees = [
        place_params(MODEL, params, layout) for layout in (LAYOUT, make_layout(tp=2), make_layout(dp=4, tp=2, zero=3))
    ]
    host = jax.device_put(params, on_host(jax.tree.map(lambda a: a.sharding, trees[0])))
    return [*trees, host]


def test_bytes_are_those_of_the_shards_on_the_device():
    *trees, host = make_trees()
    for device in jax.devices():
        for tree in trees:
            assert device_bytes(jax.tree.leaves(tree), device) == bytes_of_shards(tree, device)
        assert device_bytes(jax.tree.leaves(host), device) == 0 < bytes_of_shards(host, jax.devices()[0])


def test_what_a_call_is_given_does_not_count_beside_it():
    first, second, third, host = make_trees()
    states, devices = {"a": first, "b": second, "c": third, "d": host}, jax.devices()
    expected = [bytes_of_shards({"a": first, "c": third}, device) for device in devices]
    assert bytes_held_beside(second, states, devices) == max(expected)
    assert bytes_held_beside(second, states, devices[2:]) == max(expected[2:]) < max(expected)
    assert bytes_held_beside((first, second, third), states, devices) == 0


def peaks(*calls: Inference | Train, offload: bool = False) -> dict[str, float]:
    """Returns the MiB of each call of the second step, on pairs that all the runs share."""
    roles: dict[str, Role] = {"default": make_role(MODEL, LAYOUT)}
    states: dict[str, Any] = {"default": make_state(roles["default"])}
    if BEFORE in calls:
        role = make_role(MODEL, REF_LAYOUT, "ref", is_trained=False)
        params = place_params(MODEL, random_tree(MODEL, 1), REF_LAYOUT)
        if offload:
            role = Role(spec=role.spec, model=MODEL, home=role.home, optimizer=None, is_offloaded=True)
            params = jax.device_put(params, on_host(jax.tree.map(lambda a: a.sharding, params)))
        roles["ref"], states["ref"] = role, params
    layouts = {SFT.name: LAYOUT, BEFORE.name: REF_LAYOUT}
    executor = make_executor(DataflowGraph(calls, KEYS), layouts, roles, states)
    batch, _ = pack_in_order(make_examples([8] * 8, vocab_size=512), 16, num_rows=4)
    batch = batch.with_arrays(pair_weight=np.ones((4, 1), np.float32))
    for step in range(2):
        executor.step(batch, step)
    return {record.name: record.peak_bytes / 2**20 for record in executor.timeline.of_step(1)}


def test_dpo_with_its_reference_in_host_memory_needs_what_sft_needs():
    sft = peaks(SFT)["train"]
    offloaded, resident = peaks(BEFORE, DPO, offload=True), peaks(BEFORE, DPO)
    assert max(offloaded.values()) <= 1.1 * sft < resident["train"]
    # What it saves is what the reference takes.
    reference = max(bytes_of_shards(place_params(MODEL, random_tree(MODEL), REF_LAYOUT), d) for d in LAYOUT.devices)
    assert resident["train"] - offloaded["train"] == pytest.approx(reference / 2**20)
    # A training step holds masters, two moments and gradients at the least.
    state = jax.tree.leaves(make_state(make_role(MODEL, LAYOUT)))
    held = max(device_bytes(state, device) for device in LAYOUT.devices)
    assert sft > held / 2**20


def test_a_program_takes_its_arguments_its_scratch_and_results_that_replace_no_argument():
    x = jnp.ones((256, 256))
    adds, donates = (
        Compiled("add", lambda x: x + 1, CompileLog(), **options) for options in ({}, {"donate_argnums": 0})
    )
    assert adds.device_bytes == 0
    adds(x)
    donates(x + 0)
    assert adds.device_bytes == 2 * x.nbytes and donates.device_bytes == x.nbytes


@pytest.mark.parametrize(
    ("stats", "expected"),
    [([None, None], None), ([{"bytes_in_use": 3}], None), ([{"peak_bytes_in_use": 5}, {"peak_bytes_in_use": 7}], 7)],
)
def test_devices_that_count_say_what_they_held_at_most(stats, expected):
    devices: list[Any] = [SimpleNamespace(memory_stats=lambda one=one: one) for one in stats]
    assert measured_peak_bytes(devices) == expected
