"""What `launch/settings.py` tells XLA does what it is set for: seen in programs compiled for an H100."""

import os
import subprocess
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding
from jax.stages import Lowered

from realjax.launch.settings import DETERMINISTIC, RECOMMENDED
from tests.given.gpus import compile_for_gpus, h100s
from tests.given.processes import ROOT

pytestmark = pytest.mark.aot
PASSES = next(one for one in RECOMMENDED if one.name == "xla_disable_hlo_passes")
COMPILE = """
import jax
from tests.given.gpus import compile_for_gpus, h100s
place = jax.sharding.SingleDeviceSharding(h100s(1)[0])
compile_for_gpus(jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((8,), "float32", sharding=place)))
"""


def lower(fn: Callable[..., jax.Array], *arrays: tuple[tuple[int, ...], str]) -> Lowered:
    """Lowers a function for one H100 from the shapes and dtypes of its arrays."""
    place = SingleDeviceSharding(h100s(1)[0])
    return jax.jit(fn).lower(*(jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in arrays))


def test_the_pass_makes_a_kernel_of_a_softmax_and_is_switched_off_by_its_name():
    """XLA says nothing of a pass that does not exist."""
    lowered = lower(jax.nn.softmax, ((1024, 2048), "float32"))
    assert "__triton" in str(compile_for_gpus(lowered, **{PASSES.name: ""}).as_text())
    assert "__triton" not in str(compile_for_gpus(lowered, **{PASSES.name: PASSES.value}).as_text())


def test_sums_into_repeated_places_have_an_order_when_deterministic():
    """As the gradient of an embedding is: sorted by place, where else each is added when it comes."""

    def add(x, places):
        return jnp.zeros((512, 256)).at[places].add(x)

    lowered = lower(add, ((4096, 256), "float32"), ((4096,), "int32"))
    assert " sort(" not in str(compile_for_gpus(lowered).as_text())
    assert " sort(" in str(compile_for_gpus(lowered, **{DETERMINISTIC.name: "True"}).as_text())


@pytest.mark.parametrize("is_known", [True, False])
def test_the_plugin_knows_every_flag(is_known):
    flags = [str(one) for one in (*RECOMMENDED, DETERMINISTIC) if one.is_flag]
    flags += [] if is_known else ["--xla_gpu_enable_what_nobody_knows=true"]
    env = os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (found.returncode == 0) == is_known, found.stderr
