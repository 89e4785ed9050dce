"""Machines to compile for: what is known of them, and what is said where nothing can compile for them."""

import importlib.util

import jax
import pytest

from realjax.aot.targets import find_target, list_targets
from realjax.core.layout import Layout, ParallelStrategy
from realjax.launch.accelerators import CORES
from realjax.launch.settings import RECOMMENDED


def test_every_target_has_its_memory():
    sizes = {name: find_target(name).memory_bytes for name in list_targets()}
    assert {name: size and size // 10**9 for name, size in sizes.items()} == {
        "a100": 84,
        "h100": 84,
        "h200": 150,
        "cpu": None,
    }


def test_an_unknown_target_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="found 'b7'; there are a100, h100, h200, cpu"):
        find_target("b7")


def test_without_the_wheels_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"target h100: found none of .*; install realjax\[aot\] in an environment of"):
        find_target("h100").devices(1, 8)


def test_a_cpu_has_as_many_devices_as_the_process():
    assert len(find_target("cpu").devices(2, 4)) == 8
    with pytest.raises(ValueError, match="16 devices wanted, found 8; set JAX_NUM_CPU_DEVICES=16"):
        find_target("cpu").devices(2, 8)


def test_what_a_run_tells_xla_is_what_it_is_compiled_with():
    options = find_target("a100").compile_options
    flags = [setting for setting in RECOMMENDED if setting.is_flag and setting.architectures != {CORES}]
    assert {setting.name: options.get(setting.name) for setting in flags} == {
        setting.name: setting.value for setting in flags
    }


@pytest.mark.aot
@pytest.mark.parametrize(("name", "num_hosts"), [("h100", 1), ("h200", 2), ("a100", 1)])
def test_gpus_compile_what_they_cannot_run(name, num_hosts):
    target = find_target(name)
    devices = target.devices(num_hosts, 4)
    assert len(devices) == 4 * num_hosts and {device.platform for device in devices} == {"gpu"}
    assert devices[0].device_kind == target.title
    layout = Layout.of(ParallelStrategy(dp=num_hosts, tp=4), devices)
    x = jax.ShapeDtypeStruct((256, 256), "bfloat16", sharding=layout.sharding("data", "tensor"))
    sizes = target.compile(jax.jit(lambda x: x @ x.T).lower(x)).memory_analysis()
    assert sizes.argument_size_in_bytes == 256 * 256 * 2 // len(devices)
