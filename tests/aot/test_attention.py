"""Attention of real sizes compiled for H100s: what it takes of memory, and that devices work alone."""

import re

import jax
import jax.numpy as jnp
import pytest

from realjax.aot.hlo import collectives
from realjax.core.layout import Layout, ParallelStrategy
from realjax.engine.attention.cases import Case
from realjax.engine.attention.choose import choose, make_attention
from realjax.engine.attention.cudnn import ROOM
from realjax.models.attention import Scoring
from tests.given.gpus import compile_for_gpus, h100s
from tests.given.models import make_model

pytestmark = pytest.mark.aot

ROWS, T, N, K, H = 4, 4096, 32, 8, 128
LAYOUTS = {
    "d1m1": ParallelStrategy(),
    "d2m2": ParallelStrategy(dp=2, tp=2),
    "m4": ParallelStrategy(tp=4),
}


def compile_attention(
    kernel: str, strategy: ParallelStrategy, *, window: int | None = None, longest: int | None = None
):
    """Returns the program of values and gradients of one layer's attention, rows and heads split as in a layout."""
    layout = Layout.of(strategy, h100s(strategy.size))
    config = make_model(head_dim=H, num_q_heads=N, num_kv_heads=K, window=window).config
    case = Case.of("rows", config, layout, jnp.dtype("bfloat16"))
    attention_fn = make_attention(kernel, case, layout, longest)

    def loss(q, k, v, weights, segment_ids):
        return (attention_fn(q, k, v, segment_ids, Scoring(window=window), None).astype(jnp.float32) * weights).sum()

    kv_axis = "tensor" if K % strategy.tp == 0 else None

    def array(heads, dtype, axis="tensor"):
        return jax.ShapeDtypeStruct((ROWS, T, heads, H), dtype, sharding=layout.sharding("data", None, axis))

    arrays = [array(N, jnp.bfloat16), *(array(K, jnp.bfloat16, kv_axis) for _ in "kv"), array(N, jnp.float32)]
    segment_ids = jax.ShapeDtypeStruct((ROWS, T), jnp.int32, sharding=layout.sharding("data"))
    return compile_for_gpus(jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays, segment_ids))


def count_scores(text: str) -> int:
    """Returns how many arrays a program has with two dims of T or more, as scores and masks of whole rows have."""
    shapes = [[int(dim) for dim in dims.split(",") if dim] for dims in re.findall(r"\b[a-z]+\d+\[([\d,]*)\]", text)]
    return sum(sum(dim >= T for dim in shape) > 1 for shape in shapes)


@pytest.mark.parametrize("strategy", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("kernel", ["auto", "cudnn"])
def test_cudnn_keeps_no_scores_and_sends_nothing(kernel, strategy):
    program = compile_attention(kernel, strategy)
    text = program.as_text() or ""
    # The first group of segments and, in loops, those after it, forward and backward.
    assert len(re.findall(r'custom_call_target="__cudnn\$fmhaSoftmax"', text)) == 3
    assert len(re.findall(r'custom_call_target="__cudnn\$fmhaSoftmaxBackward"', text)) == 2
    assert not collectives(text)
    assert count_scores(text) == 0
    memory, per_device = program.memory_analysis(), ROWS * T * N * H // strategy.size
    log_totals = ROOM * ROWS * T * N // strategy.size * 4
    # In 16 bits: results and their gradients, of the group at hand and of all.
    assert memory.temp_size_in_bytes < 12 * 2 * per_device + 2 * log_totals


@pytest.mark.parametrize(("window", "longest", "parts", "seq_len"), [(None, 1024, 16, 1024), (512, 2000, 8, 2048)])
def test_cudnn_has_room_for_the_longest_segment_and_knows_the_window(window, longest, parts, seq_len):
    text = compile_attention("cudnn", ParallelStrategy(), window=window, longest=longest).as_text() or ""
    call = next(line for line in text.splitlines() if '"__cudnn$fmhaSoftmax"' in line)
    assert f"bf16[{parts},{seq_len},{N},{H}]" in call and f"bf16[{parts},{seq_len},{K},{H}]" in call
    assert f"s32[{parts},{ROOM}]" in call and f"s32[{parts},{ROOM + 1}]" in call
    assert re.search(r'"mask_type": ?"PADDING_CAUSAL"', call)
    assert re.search(rf'"sliding_window_length": ?{window or 0}\b', call)
    assert re.search(rf'"max_seg_per_batch": ?{ROOM}\b', call)


def test_blocked_keeps_scores_of_blocks_only():
    program = compile_attention("blocked", ParallelStrategy())
    assert count_scores(program.as_text() or "") == 0


def test_dense_is_what_the_count_of_scores_finds():
    assert count_scores(compile_attention("dense", ParallelStrategy()).as_text() or "") > 0


def test_devices_to_compile_for_say_what_they_can():
    layout = Layout.of(ParallelStrategy(), h100s(1))
    config = make_model(head_dim=H).config
    case = Case.of("rows", config, layout, jnp.dtype("bfloat16"))
    assert case.capability == (9, 0) and choose("auto", case).kernel == "cudnn"
