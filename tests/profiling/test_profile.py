"""The measurement of a machine, on virtual devices: what comes out, and of what it is put together."""

import jax
import pytest

from realjax.allocation.cluster import Cluster
from realjax.allocation.measured import Span
from realjax.core.layout import Layout
from realjax.profiling import clock as clock_module
from realjax.profiling import collectives
from realjax.profiling.clock import Clock
from realjax.profiling.collectives import KINDS, Group, list_groups
from realjax.profiling.layers import Case, make_probes, measure_layers, split_uses
from realjax.profiling.machine import fit_link, without_dispatch
from realjax.profiling.profile import Profile, Settings
from realjax.profiling.syncs import measure_moves, measure_rounds, measure_syncs
from tests.given.models import make_layout, make_model

QUICK = Clock(repeats=2, least_seconds=0.001)


def test_samples_alternate_and_the_least_counts(monkeypatch):
    order, now = [], [0.0]
    # Two runs before the samples: one that compiles, and one that says how many a sample is of.
    waits = iter([5.0, 4.0, 3.0, 1.0, 2.0])

    def slow():
        order.append("slow")
        now[0] += next(waits)

    monkeypatch.setattr(clock_module.time, "perf_counter", lambda: now[0])
    found = Clock(repeats=3, least_seconds=0.0).measure({"slow": slow, "other": lambda: order.append("other")})
    assert order[4:] == ["slow", "other"] * 3
    assert found == {"slow": 1.0, "other": 0.0}


def test_a_link_is_the_line_through_two_messages():
    link = fit_link({1000: 3e-6, 500_000: 1e-3, 1_001_000: 2.003e-3})
    assert link.seconds(1000) == pytest.approx(3e-6) and link.seconds(1_001_000) == pytest.approx(2.003e-3)
    # Where a large message takes no longer than a small one there is no line, and no negative bandwidth.
    assert fit_link({1000: 3e-6, 2000: 1e-6}).bandwidth == pytest.approx(2e9)
    assert without_dispatch(5.0, 1.0) == 4 and without_dispatch(1.0, 5.0) == 0.5


def test_groups_are_those_of_strategies_within_nodes_and_one_device_of_each():
    assert [(group.span, group.size) for group in list_groups(4, 8)] == [
        *(("within_node", n) for n in (2, 4, 8)),
        *(("between_nodes", n) for n in (2, 4)),
    ]
    assert not list(list_groups(1, 1))
    devices = jax.devices()[:8]
    across = Group(span="between_nodes", size=2).make_mesh(devices, devices_per_node=4)
    assert [[d.id for d in group] for group in across.devices] == [[i, i + 4] for i in range(4)]


def test_what_goes_both_ways_is_less_the_way_there():
    uses = split_uses({"forward": 2.0, "train": 6.0, "remat": 8.0, "nll": 5.0, "decode": 1.0})
    assert uses == {"forward": 2.0, "decode": 1.0, "nll": 5.0, "backward": 4.0, "backward_remat": 6.0}
    assert split_uses({"decode": 1.0}) == {"decode": 1.0}


def test_a_machine_is_measured_and_its_file_read_again():
    settings = Settings(name="here", num_nodes=1, devices_per_node=2, clock=QUICK, quick=True)
    told = []
    cluster = Profile(settings, jax.devices()[:2]).run(lambda what, done, total: told.append((done, total)))
    assert Cluster.from_json(cluster.to_json()) == cluster
    assert told == [(i, told[0][1]) for i in range(told[0][1] + 1)]
    assert (cluster.num_nodes, cluster.devices_per_node, cluster.platform) == (1, 2, "cpu")
    rates = (*cluster.matmul_flops.values(), cluster.memory_bandwidth, cluster.within_node.bandwidth)
    assert min(rates) > 0 and cluster.dispatch_seconds > 0 and cluster.to_host.bandwidth > 0
    assert {point.kind for point in cluster.measured.collectives} == set(KINDS)
    assert {point.dtype for point in cluster.measured.products} == {"float32", "bfloat16"}
    points = (*cluster.measured.collectives, *cluster.measured.products)
    assert all(point.seconds > 0 for point in points)


def test_a_collective_is_given_as_many_bytes_as_its_point_says(monkeypatch):
    talked = []

    class Running(Clock):
        def measure(self, probes):
            for probe in probes.values():
                jax.block_until_ready(probe())
            return dict.fromkeys(probes, 1.0)

    def listen(kind, talk_fn):
        def talk(x, size):
            result = talk_fn(x, size)
            talked.append((kind, max(x.nbytes, result.nbytes)))
            return result

        return talk

    for kind, talk_fn in list(collectives._CALLS.items()):
        monkeypatch.setitem(collectives._CALLS, kind, listen(kind, talk_fn))
    group, sizes = Group(span="within_node", size=4), (1024, 4096)
    points = collectives.measure_group(Running(), group, group.make_mesh(jax.devices()[:8], 8), sizes)
    assert {(point.kind, point.num_bytes) for point in points} == {(kind, n) for kind in KINDS for n in sizes}
    # One probe holds several of the same.
    assert set(talked) == {(point.kind, point.num_bytes) for point in points}


class Told(Clock):
    """Seconds by the layers and the vocabulary of a program, instead of a clock's."""

    def measure(self, probes):
        made = {"few": 10.0 + 3.0, "more": 10.0 + 9.0, "head": 15.0 + 3.0}
        return {(program, name): made[name] * (32 if program == "decode" else 1) for program, name in probes}


def test_a_layer_is_the_difference_of_programs(monkeypatch):
    monkeypatch.setattr("realjax.profiling.layers.make_probes", lambda model, case: dict.fromkeys(case.programs))
    case = Case(layout=make_layout(), dtype="float32", rows=2, tokens=64, programs=("forward", "decode"))
    layers, heads = measure_layers(Told(), make_model(vocab_size=512).config, case, sharing=2.0)
    assert {(p.use, p.seconds, p.tp, p.tokens) for p in layers} == {("forward", 6.0, 1, 64), ("decode", 6.0, 1, 64)}
    assert {(p.use, p.seconds, p.vocab_size) for p in heads} == {("forward", 30.0, 512), ("decode", 30.0, 512)}


@pytest.mark.parametrize("tp", [1, 2])
def test_programs_of_layers_run_again_and_again(tp):
    case = Case(layout=Layout.of(make_layout(tp=tp).strategy), dtype="float32", rows=2, tokens=64)
    probes = make_probes(make_model(), case)
    assert list(probes) == ["forward", "train", "remat", "nll", "decode"]
    for program in ("forward", "train"):
        jax.block_until_ready(probes[program]())
    # What is decoded is the same number of tokens each time, in all rows.
    for _ in range(3):
        chunk = probes["decode"]()
        assert chunk.num_rounds == 32 and chunk.counts.tolist() == [32, 32] and chunk.is_running.all()


def list_spans() -> dict[Span, list[jax.Device]]:
    """Two nodes of two devices each."""
    return {"within_node": jax.devices()[:2], "between_nodes": jax.devices()[:4]}


def test_a_move_is_of_all_parameters_in_their_dtype():
    class Running(Clock):
        def measure(self, probes):
            return {key: float(sum(x.nbytes for x in jax.tree.leaves(probe()))) for key, probe in probes.items()}

    points = measure_moves(Running(), make_model().config, "bfloat16", list_spans())
    assert [point.span for point in points] == [*list_spans()] * 2
    # The whole array's bytes, which each device has.
    assert all(point.seconds == point.num_bytes for point in points)


def test_a_round_on_several_devices_is_a_chunk_less_that_of_one():
    class Running(Clock):
        def measure(self, probes):
            for probe in probes.values():
                jax.block_until_ready(probe())
            return {span: {None: 32.0, "within_node": 96.0, "between_nodes": 40.0}[span] for span in probes}

    case = Case(layout=make_layout(), dtype="float32", rows=2, tokens=64)
    points = measure_rounds(Running(), make_model().config, case, list_spans(), sharing=1.5)
    assert {(p.span, p.num_devices, p.seconds) for p in points} == {("within_node", 2, 1.5), ("between_nodes", 4, 0.0)}


class Counted(Clock):
    """Runs each probe twice; seconds by what it computes on: a second on a device alone, and more on several."""

    def measure(self, probes):
        for probe in probes.values():
            for _ in range(2):
                jax.block_until_ready(probe())
        return {key: 1.0 if key[1] is None else 3.0 + key[2] for key in probes}


def test_what_devices_tell_each_other_is_what_a_step_on_several_takes_longer():
    case = Case(layout=make_layout(), dtype="float32", rows=2, tokens=64)
    points = measure_syncs(Counted(), make_model().config, case, list_spans(), sharing=1.5)
    found = {(p.span, p.num_devices, p.zero_stage): p.seconds for p in points}
    assert found == {
        ("within_node", 2, 0): 1.5,
        ("within_node", 2, 2): 3.5,
        ("between_nodes", 4, 0): 1.5,
        ("between_nodes", 4, 2): 3.5,
    }
    assert len({p.num_params for p in points}) == 2
