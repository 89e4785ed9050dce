"""Programs read from XLA's text: what is read is compared with what the program is known to do."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from realjax.aot import hlo
from realjax.core.layout import Layout, ParallelStrategy

LAYOUT = Layout.of(ParallelStrategy(dp=2, pp=2, tp=2))
SHARED = Layout.of(ParallelStrategy(dp=2, ep=2, pp=2, tp=2))  # two along `expert`, and one along `data`
MESH = LAYOUT.mesh
# As XLA writes programs for GPUs: starts and ends, results beside operands, kernels of libraries.
# ruff: noqa: E501
GPU_TEXT = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(bf16[4,8]{1,0})->bf16[4,8]{1,0}}, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%async_computation (p: bf16[2,8]) -> bf16[2,8] {
  %p = bf16[2,8]{1,0} parameter(0)
  ROOT %all-to-all = bf16[2,8]{1,0} all-to-all(%p), channel_id=9, replica_groups={{0,2},{1,3},{4,6},{5,7}}, dimensions={0}
}

%body (state: (s32[], /*index=1*/bf16[4,8])) -> (s32[], bf16[4,8]) {
  %state = (s32[], bf16[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = bf16[4,8]{1,0} get-tuple-element(%state), index=1
  %all-gather-start = (bf16[4,8]{1,0}, bf16[8,8]{1,0}) all-gather-start(%x), channel_id=1, replica_groups=[4,2]<=[8], dimensions={0}, use_global_device_ids=true, metadata={op_name="jit(step)/while/body/AB,BC->AC/dot_general"}
  %all-gather-done = bf16[8,8]{1,0} all-gather-done(%all-gather-start)
  %gemm = (bf16[8,16]{1,0}, s8[4096]{0}) custom-call(%all-gather-done, %all-gather-done), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %flash = bf16[4,8]{1,0} custom-call(%x), custom_call_target="__cudnn$fmhaSoftmax"
  %reduce-scatter-start = ((bf16[8,8]{1,0}), bf16[4,8]{1,0}) reduce-scatter-start(%all-gather-done), channel_id=2, replica_groups=[4,2]<=[2,2,2]T(0,2,1), dimensions={0}, to_apply=%add
  %reduce-scatter-done = bf16[4,8]{1,0} reduce-scatter-done(%reduce-scatter-start)
  %permute-start = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[], u32[]) collective-permute-start(%x), channel_id=3, source_target_pairs={{0,4},{1,5},{2,6},{3,7}}
  %permute-done = bf16[4,8]{1,0} collective-permute-done(%permute-start)
  ROOT %next = (s32[], bf16[4,8]{1,0}) tuple(%i, %permute-done)
}

%condition (state: (s32[], bf16[4,8])) -> pred[] {
  %state.1 = (s32[], bf16[4,8]{1,0}) parameter(0)
  ROOT %go = pred[] constant(true)
}

ENTRY %main (x: bf16[4,8], y: bf16[2,8]) -> bf16[4,8] {
  %x.1 = bf16[4,8]{1,0} parameter(0)
  %y = bf16[2,8]{1,0} parameter(1)
  %begin = (s32[], bf16[4,8]{1,0}) tuple(%x.1, %x.1)
  %while = (s32[], bf16[4,8]{1,0}) while(%begin), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %swap-start = ((bf16[2,8]{1,0}), bf16[2,8]{1,0}) async-start(%y), calls=%async_computation
  %swap-done = bf16[2,8]{1,0} async-done(%swap-start), calls=%async_computation
  %f = f32[4,8]{1,0} convert(%x.1)
  %g = f32[16]{0} convert(%y)
  %all-reduce-start = (f32[4,8]{1,0}, f32[16]{0}) all-reduce-start(%f, %g), channel_id=4, replica_groups=mesh['pipe'=2,'data'=2,'tensor'=2] {'data','pipe'}, to_apply=%add
  ROOT %out = bf16[4,8]{1,0} get-tuple-element(%while), index=1
}
"""


def read(fn, *args):
    return hlo.read(jax.jit(fn).lower(*args).compile().as_text())


def over(fn, spec, out, layout=LAYOUT):
    return partial(jax.shard_map, mesh=layout.mesh, in_specs=spec, out_specs=out, check_vma=False)(fn)


def test_a_collective_in_loops_counts_as_often_as_they_turn():
    def fn(x):
        def turn(x, _):
            return jax.lax.scan(lambda x, _: (jax.lax.psum(jnp.sin(x), "data"), None), x, length=3)[0], None

        return jax.lax.scan(turn, x, length=5)[0]

    reading = read(over(fn, P("data"), P("data")), jnp.zeros((8, 16)))
    (one,) = reading.collectives
    assert (one.kind, one.dtype, one.bytes, one.times, one.group_size) == ("all-reduce", "f32", 4 * 16 * 4, 15, 2)
    assert one.total_bytes == 15 * one.bytes and one.wire_bytes == one.total_bytes
    assert one.axes(LAYOUT) == ("data",) and "psum" in one.op_name
    assert not reading.open_loops and not reading.opaque_calls


@pytest.mark.parametrize("axis", MESH.axis_names)
def test_kinds_and_axes_of_collectives(axis):
    moves = {
        "all-gather": lambda x: jax.lax.all_gather(x, axis, tiled=True),
        "reduce-scatter": lambda x: jax.lax.psum_scatter(x, axis, tiled=True),
        "all-to-all": lambda x: jax.lax.all_to_all(x, axis, 0, 0, tiled=True),
        "collective-permute": lambda x: jax.lax.ppermute(x, axis, [(0, 1), (1, 0)]),
    }
    layout = SHARED if axis == "expert" else LAYOUT
    for kind, move in moves.items():
        fn = over(lambda x, move=move: move(x), P(axis), P(axis), layout)
        found = read(fn, jnp.zeros((8, 16))).collectives
        assert {c.kind for c in found} == {kind}
        assert {c.axes(layout) for c in found} == {(axis,)}
        gathered = 2 if kind == "all-gather" else 1
        assert hlo.bytes_along(found, layout, axis, kind=kind) == 4 * 16 * 4 * gathered


def test_axes_are_those_of_the_mesh_whatever_its_devices():
    x = jax.ShapeDtypeStruct((16, 16), jnp.float32)
    devices = np.array(jax.devices()[:8])[::-1]
    layout = Layout.of(LAYOUT.strategy, tuple(devices))
    for spec, axes in ((("data", "tensor"), ("tensor",)), ((("pipe", "tensor"), "data"), ("data",))):
        given = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.sharding(*spec))
        whole = layout.sharding(spec[0], None)
        compiled = jax.jit(lambda x: x + 1, out_shardings=whole).lower(given).compile()
        found = hlo.collectives(compiled.as_text())
        assert {c.axes(layout) for c in found} == {axes}


def test_several_axes_at_once_are_named_in_the_mesh_order():
    found = read(over(lambda x: jax.lax.psum(x, ("tensor", "pipe")), P("data"), P("data")), jnp.zeros((8, 16)))
    (one,) = found.collectives
    assert one.axes(LAYOUT) == ("pipe", "tensor") and one.group_size == 4
    assert one.wire_bytes == one.total_bytes * 2 * 3 / 4


def test_flops_of_products_in_loops_and_gradients():
    def loss(w, x):
        y, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)
        return jnp.sum(jnp.einsum("bd,cd->bc", y, y))

    w, x = jnp.zeros((6, 32, 32)), jnp.zeros((8, 32))
    layer, last = 2 * 8 * 32 * 32, 2 * 8 * 8 * 32
    assert read(loss, w, x).matmul_flops == 6 * layer + last
    # Of each product two more; that of the last one's value is not needed.
    assert read(jax.grad(loss), w, x).matmul_flops == pytest.approx(3 * 6 * layer + 2 * last, rel=0.01)


def test_of_branches_the_largest_counts():
    def fn(i, x):
        return jax.lax.switch(i, [lambda x: x, lambda x: x @ x, lambda x: x @ (x @ x)], x)

    assert read(fn, jnp.int32(1), jnp.zeros((16, 16))).matmul_flops == 2 * 2 * 16**3


def test_a_loop_of_unknown_length_counts_once_and_is_told():
    def fn(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 10, lambda x: x @ x, x @ x) @ x

    reading = read(fn, jnp.zeros((16, 16)))
    assert len(reading.open_loops) == 1
    assert (reading.matmul_flops, reading.open_flops) == (3 * 2 * 16**3, 2 * 16**3)


@pytest.mark.parametrize(
    ("is_due", "num_open", "turns"),
    [(lambda i, x: (i > 1) & (i + 1 < 6), 0, 3), (lambda i, x: (i > 1) & (x[0, 0] > 0), 1, 8)],
    ids=["of the counter alone", "of an array too"],
)
def test_a_loop_of_at_most_one_turn_counts_as_often_as_the_counter_around_lets_it(is_due, num_open, turns):
    def turn(i, x):
        once = lambda state: (jnp.zeros((), bool), state[1] @ state[1])
        return jax.lax.while_loop(lambda state: state[0], once, (is_due(i, x), x))[1]

    reading = read(lambda x: jax.lax.fori_loop(0, 8, turn, x), jnp.zeros((16, 16)))
    assert len(reading.open_loops) == num_open
    assert reading.matmul_flops == turns * 2 * 16**3


def test_a_gpus_text():
    reading = hlo.read(GPU_TEXT)
    found = {c.kind: c for c in reading.collectives}
    gathered = found["all-gather"]
    assert (gathered.bytes, gathered.times, gathered.axes(LAYOUT)) == (8 * 8 * 2, 3, ("tensor",))
    assert gathered.op_name == "jit(step)/while/body/AB,BC->AC/dot_general"
    scattered = found["reduce-scatter"]
    assert (scattered.bytes, scattered.dtype, scattered.axes(LAYOUT)) == (8 * 8 * 2, "bf16", ("data",))
    assert (found["collective-permute"].bytes, found["collective-permute"].axes(LAYOUT)) == (4 * 8 * 2, ("pipe",))
    reduced = found["all-reduce"]
    assert (reduced.bytes, reduced.times, reduced.axes(LAYOUT)) == (4 * (32 + 16), 1, ("pipe", "data"))
    assert reduced.groups.tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert (found["all-to-all"].times, found["all-to-all"].axes(LAYOUT)) == (1, ("data",))
    assert reading.matmul_flops == 3 * 2 * 8 * 16 * 8
    assert reading.opaque_calls == {"__cudnn$fmhaSoftmax": 3}
    assert hlo.bytes_along(reading.collectives, LAYOUT, "tensor") == 3 * 8 * 8 * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no program"),
        ("HloModule m\n\nENTRY %main (x: f9[2]) -> f9[2] {\n  ROOT %x = f9[2]{0} parameter(0)\n}\n", "'f9'.*BITS"),
    ],
)
def test_what_cannot_be_read_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        hlo.read(text)


def test_a_group_outside_the_mesh_is_refused():
    (one,) = [c for c in hlo.collectives(GPU_TEXT) if c.kind == "all-gather"]
    with pytest.raises(ValueError, match="device 7 is not among the 2"):
        one.axes(Layout.of(ParallelStrategy(dp=2)))


def test_a_ragged_all_to_all_counts_as_what_it_has_room_for():
    sizes = ", ".join(["%n"] * 4)
    types = "(bf16[4,8]{1,0}, bf16[6,8]{1,0}, s64[2]{0}, s64[2]{0}, s64[2]{0}, s64[2]{0})"
    text = f"""HloModule m, num_partitions=2

ENTRY %main (x: bf16[4,8], y: bf16[6,8], n: s64[2]) -> bf16[6,8] {{
  %x = bf16[4,8]{{1,0}} parameter(0)
  %y = bf16[6,8]{{1,0}} parameter(1)
  %n = s64[2]{{0}} parameter(2)
  %start = ({types}, bf16[6,8]{{1,0}}) ragged-all-to-all-start(%x, %y, {sizes}), replica_groups={{{{0,1}}}}
  ROOT %done = bf16[6,8]{{1,0}} ragged-all-to-all-done(%start)
}}
"""
    (found,) = hlo.collectives(text)
    assert (found.kind, found.dtype, found.bytes, found.group_size) == ("ragged-all-to-all", "bf16", 6 * 8 * 2, 2)
