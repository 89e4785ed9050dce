"""What is exchanged in messages of its own on CPUs, and what stages exchange: counted, a message a second."""

from dataclasses import replace

import pytest

from realjax.allocation.cluster import Cluster, Link
from realjax.allocation.cost import call_cost
from realjax.allocation.measured import Measured, RoundPoint, SyncPoint
from tests.given.llama_calls import H100S, LLAMA, choose, make_work


def test_a_cpu_reduces_each_kernel_for_itself():
    """XLA makes one reduce-scatter of all gradients on accelerators alone."""
    work, sharded = make_work("train"), choose(dp=8, zero_stage=2)
    slow = replace(H100S, name="slow", factors={}, within_node=Link(bandwidth=1e12, latency=1.0))
    on_gpu, on_cpu = (
        call_cost(work, sharded, replace(slow, name=platform, platform=platform)).terms["dp"]
        for platform in ("gpu", "cpu")
    )
    assert on_gpu == pytest.approx(7 + 7, rel=0.1) and on_cpu == pytest.approx(9 * (7 + 2 * 7), rel=0.1)


# A message takes a second, however long: terms count messages, an all-reduce of two devices as two.
LATENCIES = replace(H100S, factors={}, within_node=Link(bandwidth=1e30, latency=1.0))
ON_CPU = replace(LATENCIES, name="messages of a cpu", platform="cpu")


@pytest.mark.parametrize(
    ("sizes", "messages"),
    [
        ({}, 0),
        ({"dp": 2}, 0),  # small sums go with those of gradients
        ({"tp": 2}, 1),  # the norm
        ({"pp": 2}, 1 + 2 * 4),  # and two of the head for each of four micro-batches
    ],
)
def test_small_sums_of_an_update_take_time_on_cpus(sizes, messages):
    work = make_work("train")
    assert call_cost(work, choose(**sizes), ON_CPU).terms.get("messages", 0.0) == pytest.approx(2 * messages)
    assert "messages" not in call_cost(work, choose(**sizes), LATENCIES).terms


def test_each_round_on_a_cpu_asks_which_rows_run():
    """All of 64 answers run for 384 rounds; what the host reads are a gather for each of 4 admissions and 12 chunks, of
    which each takes as long as a sum."""
    terms = call_cost(make_work("generate"), choose(dp=2), ON_CPU).terms
    assert terms["messages"] == pytest.approx(2 * (384 + 4 + 12))
    assert "messages" not in call_cost(make_work("generate"), choose(), ON_CPU).terms


def test_stages_that_decode_share_the_vocabulary():
    """In each tick a stage hands on, the last one's states and the table's rows are summed, and logits exchanged: a
    message or two, on CPUs all as long as a sum."""
    work, ticks = make_work("generate"), 2 * 384
    on_cpu, on_gpu = (call_cost(work, choose(pp=2), cluster).terms for cluster in (ON_CPU, LATENCIES))
    assert on_gpu["pp"] == on_gpu["vocab"] == pytest.approx(ticks * (1 + 2))
    assert on_cpu["pp"] == on_cpu["vocab"] == pytest.approx(ticks * (2 + 2))
    assert on_cpu["messages"] == pytest.approx(ticks * 3 * 2) and "messages" not in on_gpu


def test_zero_3_exchanges_each_matrix_of_a_layer_on_cpus():
    """Of seven kernels of a layer and the head's gathers and sums: two and one a kernel, one and one of the head."""
    ticks = 4  # micro-batches
    of = lambda cluster: call_cost(make_work("train"), choose(dp=2, zero_stage=3, num_mbs=4), cluster).terms["zero"]
    num_layers = LLAMA.num_layers
    assert of(ON_CPU) == pytest.approx(ticks * (num_layers * 7 * (2 + 2) + 1 + 2))
    assert of(LATENCIES) == pytest.approx(ticks * (num_layers * (2 + 1) + 1 + 1))


def test_a_tied_table_and_a_scalar_head_are_no_matrix_of_their_own():
    plain, tied, critic = (
        call_cost(make_work("train", model=replace(LLAMA, **changes)), choose(dp=2, zero_stage=2), ON_CPU).terms["dp"]
        for changes in ({}, {"is_tied": True}, {"is_critic": True})
    )
    assert plain == pytest.approx(9 * 3) and tied == critic == pytest.approx(8 * 3)


def test_measured_rounds_count_instead_of_a_sum_of_few_bytes():
    """64 answers of 384 rounds, on four devices a ring's 3/4 of what two were measured to take, by 1/2."""
    point = RoundPoint(span="within_node", num_devices=2, seconds=10.0)
    cluster = replace(ON_CPU, name="rounds", measured=Measured(rounds=(point,)))
    before, after = (call_cost(make_work("generate"), choose(dp=4), each).terms for each in (ON_CPU, cluster))
    sums = 2 * 3 * 384  # an all-reduce of four devices: twice three messages
    assert after["messages"] - before["messages"] == pytest.approx(384 * 15 - sums)
    assert call_cost(make_work("generate"), choose(), cluster).terms.get("messages", 0.0) == 0


def measured_at(num_params: float, seconds: float) -> Cluster:
    """A cluster of CPUs whose steps of two sizes were measured on four devices with ZeRO 2, on a line through 0."""
    points = tuple(
        SyncPoint(
            dtype="bfloat16",
            span="within_node",
            num_devices=4,
            zero_stage=2,
            num_params=round(num_params * times),
            seconds=seconds * times,
        )
        for times in (0.5, 2.0)
    )
    return replace(ON_CPU, measured=Measured(syncs=points))


def test_steps_measured_on_several_devices_say_what_gradients_take():
    """Scaled as a ring of eight instead of four is; the update is then that of all parameters."""
    work = make_work("train")
    cluster = measured_at(LLAMA.num_params, 6.0)
    sharded, whole = (call_cost(work, choose(dp=8, zero_stage=stage), cluster).terms for stage in (2, 0))
    assert sharded["dp"] == pytest.approx(6.0 * (1 - 1 / 8) / (1 - 1 / 4), rel=1e-3)
    assert sharded["optimizer"] == pytest.approx(whole["optimizer"])
    # Without ZeRO and in the third stage nothing was measured.
    before = {stage: call_cost(work, choose(dp=8, zero_stage=stage), ON_CPU).terms for stage in (0, 3)}
    assert whole["dp"] == before[0]["dp"]
    assert call_cost(work, choose(dp=8, zero_stage=3), cluster).terms == before[3]
