from types import SimpleNamespace

import jax
import pytest

from realjax.core.layout import MESH_AXES, Layout, ParallelStrategy, name_devices
from tests.given.models import make_layout


def test_a_layout_is_a_value():
    one, other = make_layout(dp=2, tp=2), make_layout(dp=2, tp=2)
    assert one == other and hash(one) == hash(other) and one.mesh == other.mesh
    assert one != make_layout(dp=4) and one != Layout.of(one.strategy, jax.devices()[4:])
    assert one.replicated == other.replicated


def test_devices_of_several_processes_are_numbered_without_gaps(monkeypatch):
    devices = tuple(SimpleNamespace(platform="cpu", id=2048 * process + i) for process in range(2) for i in range(3))
    monkeypatch.setattr(jax, "devices", lambda backend: devices)
    assert name_devices(devices[1:5]) == "1-4"


def test_the_tensor_axis_varies_fastest():
    layout = make_layout(pp=2, dp=2, tp=2)
    assert layout.mesh.axis_names == MESH_AXES and layout.mesh.devices.shape == (2, 2, 1, 2)
    assert [device.id for device in layout.mesh.devices.flat] == [device.id for device in jax.devices()]
    assert layout.mesh.devices[0, 0, 0, 1] == jax.devices()[1]


def test_devices_that_share_experts_are_among_those_with_rows():
    mesh = make_layout(dp=4, ep=2, tp=2).mesh
    assert dict(mesh.shape) == {"pipe": 1, "data": 2, "expert": 2, "tensor": 2}
    assert mesh.devices[0, 0, 1, 0] == jax.devices()[2]


def test_a_layout_keeps_to_its_own_devices():
    chosen = [jax.devices()[i] for i in (5, 2, 3, 7)]
    layout = Layout.of(ParallelStrategy(dp=2, tp=2), chosen)
    x = jax.device_put(jax.numpy.arange(8).reshape(4, 2), layout.sharding("data", "tensor"))
    assert x.sharding.device_set == set(chosen)
    assert [shard.data.tolist() for shard in x.addressable_shards if shard.device.id == 2] == [[[1], [3]]]


def test_layouts_read_well():
    strategy = ParallelStrategy(dp=2, tp=2, sequence_parallel=True, zero_stage=3)
    assert str(strategy) == "d2p1m2+sp+zero3" and strategy.size == 4
    assert str(ParallelStrategy(dp=4, ep=2)) == "d4e2p1m1"
    devices = [jax.devices()[i] for i in (0, 1, 2, 6)]
    assert str(Layout.of(strategy, devices)) == "d2p1m2+sp+zero3 on 0-2,6"


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ParallelStrategy(tp=0), "tp=0; every parallel size must be at least 1"),
        (lambda: ParallelStrategy(dp=4, ep=3), r"ep=3 does not divide dp=4; .* a divisor of the data parallel size"),
        (lambda: ParallelStrategy(zero_stage=4), "zero_stage=4; it must be 0, 1, 2 or 3"),
        (lambda: Layout.of(ParallelStrategy(dp=2), jax.devices()[:3]), r"needs dp\*pp\*tp = 2 devices, got 3"),
        (lambda: Layout.of(ParallelStrategy(dp=16)), r"needs dp\*pp\*tp = 16 devices, got 8"),
        (lambda: Layout.of(ParallelStrategy(dp=2), jax.devices()[:1] * 2), r"a device is listed twice in \[0, 0\]"),
    ],
)
def test_impossible_layouts_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
