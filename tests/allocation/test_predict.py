"""What is predicted of a plan: its step is its calls in order, and measured steps make it right."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from realjax.allocation.choice import Choice
from realjax.allocation.cluster import find_cluster
from realjax.allocation.cost import call_cost, fetch_cost, move_cost
from realjax.allocation.machine import find_machine, need_cluster
from realjax.allocation.predict import predict
from realjax.allocation.workload import CallWork, Kind, Lengths, ModelShape, RoleWork, Workload
from realjax.core.layout import ParallelStrategy
from realjax.core.planner_config import PlannerConfig
from realjax.dataflow.run import AllocationOptions

MODEL = ModelShape(
    hidden_size=1024, num_layers=8, num_q_heads=8, num_kv_heads=8, head_dim=128, ffn_size=2816, vocab_size=32000
)
H100 = find_cluster("h100")


def make_call(name: str, role: str, kind: Kind, after: tuple[str, ...] = ()) -> CallWork:
    generate = {"prompts": Lengths.all(64), "answers": Lengths.all(64)} if kind == "generate" else {}
    work = CallWork(
        name=name,
        role=role,
        kind=kind,
        model=MODEL,
        dtype="bfloat16",
        num_sequences=32,
        prompts=Lengths.all(128),
        pack_fn=lambda multiple: (-(-8 // multiple) * multiple, 512),
        after=after,
    )
    return replace(work, **generate)


WORKLOAD = Workload(
    calls=(
        make_call("gen", "actor", "generate"),
        make_call("ref", "ref", "inference", after=("gen",)),
        make_call("rew", "rew", "inference", after=("gen",)),
        make_call("train", "actor", "train", after=("gen", "ref", "rew")),
    ),
    roles={
        "actor": RoleWork(name="actor", model=MODEL, dtype="bfloat16", is_trained=True),
        "ref": RoleWork(name="ref", model=MODEL, dtype="bfloat16", offload=True),
        "rew": RoleWork(name="rew", model=MODEL, dtype="bfloat16", offload=False),
    },
)


def on(*devices: int, dp: int = 1, tp: int = 1) -> Choice:
    return Choice(strategy=ParallelStrategy(dp=dp, tp=tp), devices=devices)


CHOICES = {"gen": on(0, 1, dp=2), "ref": on(0), "rew": on(1), "train": on(0, 1, tp=2)}


def test_calls_overlap_on_devices_of_their_own_but_not_on_cpus_of_one_process():
    found = predict(WORKLOAD, CHOICES, H100, source="here")
    in_turn = predict(WORKLOAD, CHOICES, replace(H100, overlaps=False), source="here")
    assert found.seconds == in_turn.seconds and in_turn.step_seconds == pytest.approx(sum(found.seconds.values()))
    assert found.step_seconds < in_turn.step_seconds


def test_a_call_takes_what_brings_its_parameters_too():
    found = predict(WORKLOAD, CHOICES, H100, source="here")
    gen, ref, rew, train = WORKLOAD.calls
    actor, roles = WORKLOAD.roles["actor"], WORKLOAD.roles
    own = {call.name: call_cost(call, CHOICES[call.name], H100).seconds for call in WORKLOAD.calls}
    moved = move_cost(actor, CHOICES["train"], CHOICES["gen"], H100).seconds
    fetched = fetch_cost(roles["ref"], CHOICES["ref"], H100).seconds
    assert moved > 0 and fetched > 0
    assert found.seconds == pytest.approx({**own, "gen": own["gen"] + moved, "ref": own["ref"] + fetched})
    # On device 1 the reward model stays while the actor is trained: offloading the reference saves device 0 that.
    at_home = replace(WORKLOAD, roles={**roles, "rew": replace(roles["rew"], offload=True)})
    assert predict(at_home, CHOICES, H100, source="here").peak_bytes["train"] < found.peak_bytes["train"]


def test_measured_steps_make_predictions_right():
    found = predict(WORKLOAD, CHOICES, H100, source="here")
    measured = {f"time/{call}": 3 * seconds for call, seconds in found.seconds.items()}
    measured["time/gen"] = found.seconds["gen"] / 2
    again = predict(WORKLOAD, CHOICES, found.refined_cluster(measured), source="there")
    # What brings the parameters has no factor.
    assert again.seconds["train"] == pytest.approx(measured["time/train"])
    assert again.seconds["rew"] == pytest.approx(measured["time/rew"])
    assert again.seconds["gen"] == pytest.approx(measured["time/gen"], rel=0.2)
    assert found.refine({}) == H100.factors


def device(platform: str, kind: str) -> SimpleNamespace:
    return SimpleNamespace(platform=platform, device_kind=kind, process_index=0)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA B200", "b200"),
    ],
)
def test_a_known_accelerator_has_its_data_sheet(kind, name):
    options = AllocationOptions(mode="manual", n_nodes=2, n_gpus_per_node=4, calls={})
    machine = find_machine(options, [device("gpu", kind)] * 8)  # pyright: ignore[reportArgumentType]
    assert machine is not None and machine.source == f"the data sheet of {name}"
    assert (machine.cluster.num_nodes, machine.cluster.devices_per_node) == (2, 4)
    assert machine.cluster.matmul_flops == find_cluster(name).matmul_flops


def test_other_machines_need_a_description(tmp_path):
    options = AllocationOptions(mode="manual", n_nodes=1, n_gpus_per_node=1, calls={})
    other = [device("gpu", "NVIDIA T4")]
    assert find_machine(options, other) is None  # pyright: ignore[reportArgumentType]
    file = tmp_path / "cluster.json"
    file.write_text(replace(H100, name="mine").to_json())
    described = replace(options, planner=PlannerConfig(cluster=str(file)))
    machine = find_machine(described, other)  # pyright: ignore[reportArgumentType]
    assert machine is not None and machine.cluster.name == "mine" and machine.source == str(file)


def test_a_description_of_another_platform_does_not_say_what_runs_compute_in(tmp_path):
    file = tmp_path / "cluster.json"
    file.write_text(replace(H100, platform="gpu").to_json())
    options = AllocationOptions(mode="search", n_nodes=1, n_gpus_per_node=1, calls={})
    described = replace(options, planner=PlannerConfig(cluster=str(file)))
    assert need_cluster(described, [device("cpu", "cpu")]).platform == "cpu"  # pyright: ignore[reportArgumentType]


def test_virtual_devices_share_the_cores(monkeypatch):
    monkeypatch.setattr("realjax.allocation.machine.count_cores", lambda: 2)
    options = AllocationOptions(mode="manual", n_nodes=1, n_gpus_per_node=8, calls={})
    machine = find_machine(options, [device("cpu", "cpu")] * 8)  # pyright: ignore[reportArgumentType]
    assert machine is not None and "default of a CPU" in machine.source
    core = find_cluster("cpu")
    assert machine.cluster.matmul_flops["float32"] == core.matmul_flops["float32"] / 4
