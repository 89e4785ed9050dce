"""Experts compiled for H100s: what they multiply, and what devices that share them tell each other."""

from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from realjax.algorithms.sft import SFT_LOSS
from realjax.aot.hlo import read
from realjax.core.axes import optimizer_rules, resolve_sharding, train_rules, tree_shardings
from realjax.core.batch import Batch, find_dims
from realjax.core.compute import Compute
from realjax.core.layout import Layout, ParallelStrategy
from realjax.engine.groups import multiply_padded, sum_padded
from realjax.engine.train import TrainOptions, make_gradients
from realjax.models.config import LayerKind, MoEConfig
from tests.given.gpus import compile_for_gpus, h100s
from tests.given.models import make_model

pytestmark = pytest.mark.aot

EXPERTS = MoEConfig(num_experts=16, experts_per_token=4, expert_size=512)
WIDTHS = {"hidden_size": 1024, "num_q_heads": 8, "num_kv_heads": 8, "head_dim": 128, "vocab_size": 2048}
ROW_LEN = 4096


def test_groups_cost_half_as_many_products_again_as_they_need():
    here = jax.sharding.SingleDeviceSharding(h100s(1)[0])
    shape = lambda dims, dtype="bfloat16": jax.ShapeDtypeStruct(dims, dtype, sharding=here)
    x, y, kernels, sizes = shape((4096, 512)), shape((4096, 256)), shape((16, 512, 256)), shape((16,), "int32")
    for fn, args in (
        (lambda x, kernels, sizes: multiply_padded(x, kernels, sizes, False), (x, kernels, sizes)),
        (lambda y, kernels, sizes: multiply_padded(y, kernels, sizes, True), (y, kernels, sizes)),
        (sum_padded, (x, y, sizes)),
    ):
        reading = read(compile_for_gpus(jax.jit(fn).lower(*args)).as_text() or "")
        assert reading.matmul_flops <= 1.6 * 2 * 4096 * 512 * 256 and not reading.opaque_calls


def test_devices_that_share_experts_tell_each_other_a_layers_tokens_five_times():
    """There and back in the forward pass, there again where it is computed again, and gradients there and back: each as
    large as the room for all tokens of eight devices. Gradients of experts cross no device: none has the same ones."""
    model = make_model(pattern=(LayerKind(feed_forward=EXPERTS),), max_positions=ROW_LEN, **WIDTHS)
    layout = Layout.of(ParallelStrategy(dp=8, ep=8), h100s(8))
    rules = train_rules(layout.strategy)
    keys = {"loss_mask": jnp.bool_, **dict.fromkeys(("tokens", "positions", "segment_ids"), jnp.int32)}
    place = lambda key: resolve_sharding(find_dims(key), (16, ROW_LEN), rules, layout, key)
    batch = Batch(arrays={key: jax.ShapeDtypeStruct((16, ROW_LEN), t, sharding=place(key)) for key, t in keys.items()})
    stored = tree_shardings(model.axes, model.abstract, optimizer_rules(layout.strategy), layout)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), model.abstract, stored)
    options = TrainOptions(compute=Compute(dtype="bfloat16", remat=True, max_segment_len=ROW_LEN), num_mbs=2)
    gradients = make_gradients(model, SFT_LOSS, layout, options)
    found = Counter()
    for one in read(compile_for_gpus(jax.jit(gradients).lower(params, batch)).as_text() or "").collectives:
        assert one.axes(layout) == ("expert",)
        found[one.kind, one.dtype] += one.total_bytes
    room = 8 * ROW_LEN * 1024 * 2  # of all devices' tokens in bfloat16
    assert found["ragged-all-to-all", "bf16"] == 5 * 2 * model.config.num_layers * room
    whole = sum(x.size for x in jax.tree.leaves(model.abstract)) - 2 * 16 * 3 * 1024 * 512
    assert sum(size for (kind, _), size in found.items() if "reduce" in kind) == pytest.approx(4 * whole, rel=0.05)
