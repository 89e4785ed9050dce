"""What the cost model says of calls, against sums by hand and properties that hold of any machine."""

from dataclasses import replace

import pytest

from realjax.allocation.choice import Choice
from realjax.allocation.cluster import find_cluster
from realjax.allocation.cost import call_cost, fetch_cost, move_cost
from realjax.allocation.workload import CallWork, Lengths, ModelShape, RoleWork
from realjax.core.layout import ParallelStrategy

LLAMA = ModelShape(
    hidden_size=4096, num_layers=32, num_q_heads=32, num_kv_heads=32, head_dim=128, ffn_size=11008, vocab_size=32000
)
KINDS = ("train", "inference", "generate")


def make_work(kind: str, **changes) -> CallWork:
    """Returns a call on 64 sequences of 512 tokens, four of which lie in a row."""
    given = {"prompts": Lengths.all(128), "answers": Lengths.all(384)} if kind == "generate" else {}
    work = CallWork(
        name="call",
        role="role",
        kind=kind,
        model=LLAMA,
        dtype="bfloat16",
        num_sequences=64,
        prompts=Lengths.all(512),
        pack_fn=lambda multiple: (-(-16 // multiple) * multiple, 2048),
    )
    return replace(work, **{**given, **changes})


def choose(num: int | None = None, first: int = 0, **sizes) -> Choice:
    """Returns a choice of consecutive devices."""
    own = {name: sizes.pop(name) for name in list(sizes) if name in ParallelStrategy.__dataclass_fields__}
    strategy = ParallelStrategy(**own)
    num = num or strategy.size * sizes.get("context", 1)
    return Choice(strategy=strategy, devices=tuple(range(first, first + num)), **sizes)


H100S = find_cluster("h100x128")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [{}, {"tp": 8, "sequence_parallel": True}, {"dp": 4, "pp": 2}, {"pp": 4, "tp": 4}])
def test_terms_are_seconds_and_add_up(kind, sizes):
    if kind == "generate":
        sizes = {name: size for name, size in sizes.items() if name != "sequence_parallel"}
    cost = call_cost(make_work(kind), choose(**sizes), H100S)
    assert all(seconds > 0 for seconds in cost.terms.values())
    assert cost.seconds == pytest.approx(sum(cost.terms.values()))


def test_a_copy_in_the_same_layout_moves_nothing():
    role = RoleWork(name="role", model=LLAMA, dtype="bfloat16")
    assert move_cost(role, choose(tp=8), choose(tp=8), H100S).seconds == 0


def test_parameters_from_the_host_come_in_parts():
    role = RoleWork(name="role", model=LLAMA, dtype="bfloat16")
    one, eight = (fetch_cost(role, choose(tp=tp), H100S).terms["host"] for tp in (1, 8))
    latency = H100S.to_host.latency
    assert one - latency == pytest.approx(8 * (eight - latency))
