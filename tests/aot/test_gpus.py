"""A program compiled for eight H100s where there is none: its memory and its collectives can be read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.given.gpus import compile_for_gpus, h100s

pytestmark = pytest.mark.aot


@pytest.mark.parametrize("num_hosts", [1, 2])
def test_a_split_product_has_its_shares_of_memory_and_one_sum(num_hosts):
    devices = h100s(8 // num_hosts, num_hosts)
    assert [device.platform for device in devices] == ["gpu"] * 8
    mesh = Mesh(np.array(devices), ("split",))
    left = jax.ShapeDtypeStruct((1024, 4096), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(None, "split")))
    right = jax.ShapeDtypeStruct((4096, 512), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("split")))
    product = jax.jit(jnp.matmul, out_shardings=NamedSharding(mesh, PartitionSpec()))
    program = compile_for_gpus(product.lower(left, right))
    memory = program.memory_analysis()
    assert memory.argument_size_in_bytes == (1024 * 4096 + 4096 * 512) * 2 // 8
    assert memory.output_size_in_bytes == 1024 * 512 * 2
    text = program.as_text()
    assert text is not None and text.count(" all-reduce-start(") == 1
    # Summed in 16 bits, as on a GPU; a CPU's program would have widened it.
    assert "bf16[1024,512]" in next(line for line in text.splitlines() if " all-reduce-start(" in line)
