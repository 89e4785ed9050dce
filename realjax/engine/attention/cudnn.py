"""cuDNN's flash attention, a segment at a time: no scores in memory, and no work across segments or on padding.

cuDNN has a layout for packed rows: from a list of starts and lengths it takes sequences of up to `seq_len` tokens out
of one run of memory, each causal by itself, and touches nothing between them. The list, and room for each of its
sequences at full length, are of fixed size, so segments go in by groups: nearly always one, and more where they are
many and short. Sinks stay outside of the calls: with the log normalisers at hand a logit more is a factor of the
outputs, and the backward call goes by the normalisers and outputs that it is given.

JAX has these calls in a private module, see `find_api_fault`. They are bound here by themselves, below JAX's own
function, which takes offsets of keys for offsets of queries where the heads differ (mended in
https://github.com/jax-ml/jax/pull/39521), and asks the default backend, not the devices at hand, what it can do.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from realjax.models.attention import Scoring

MODULE = "jax._src.cudnn.fused_attention_stablehlo"
# What the calls are known to take, and what newer releases added, which None leaves out.
OPERANDS = "query key value bias q_seqlen kv_seqlen q_offsets kv_offsets page_table_k page_table_v"
OPTIONS = "scale seed dropout_rate variadic_args mask_type layout sliding_window_length"
KNOWN = {
    "fwd": f"ctx {OPERANDS} {OPTIONS} is_training".split(),
    "bwd": f"ctx {OPERANDS} activation fwd_output grad_output {OPTIONS}".split(),
}
ADDED = ("score_mod_args", "score_mod_name", "score_mod_jaxpr")

# Sequences of full length that a group has room for, for each `seq_len` tokens of the rows. The backward pass has
# float32 scratch of this many times the queries' size.
ROOM = 4
# cuDNN counts numbers in 32 bits.
MOST_NUMBERS = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How a call sees its tokens, and what it does: `num_parts` parts of `seq_len` tokens, one after the other."""

    num_parts: int
    seq_len: int
    window: int | None
    scale: float

    @property
    def group_size(self) -> int:
        """The sequences of one call."""
        return self.num_parts * ROOM


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Segments:
    """The segments of flattened rows, in order."""

    starts: Array  # [G * group_size] token where each begins; the number of tokens where there is none
    lengths: Array  # [G * group_size] 0 where there is none
    group: Array  # [R, T, 1, 1] which group a token's segment is in, -1 on padding
    num_groups: Array
    number: Array  # [R, T] the token's segment


def cudnn_attention(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array,
    scoring: Scoring,
    sinks: Array | None,
    max_segment_len: int | None,
) -> Array:
    """Returns attention within segments `[R, T, N, H]`, zero on padding; NaN where a segment is longer than the bound.

    A segment is a run of one id other than 0. Raises ValueError for rows of 2^31 numbers.
    """
    R, T, N, H = q.shape
    if T * N * H > MOST_NUMBERS:
        raise ValueError(
            f"attention: 'cudnn' counts in 32 bits, found rows of {T} x {N} x {H} numbers a device; use shorter rows, "
            "more tensor parallelism or attention=blocked"
        )
    shortest = min(max_segment_len or T, T)
    seq_len = next(n for n in range(shortest, T + 1) if T % n == 0)
    # No number may reach 2^31, that of the end of all rows included.
    rows = next(n for n in range(R, 0, -1) if R % n == 0 and n * T * N * H <= MOST_NUMBERS)
    window = scoring.window if scoring.window is not None and scoring.window < seq_len else None
    scale = scoring.find_scale(H)
    shape = Shape(num_parts=rows * T // seq_len, seq_len=seq_len, window=window, scale=scale)
    attend = lambda args: _attend(*args[:3], sinks, find_segments(args[3], shape.group_size), shape)
    if rows == R:
        return attend((q, k, v, segment_ids))
    parts = jax.tree.map(lambda x: x.reshape(R // rows, rows, *x.shape[1:]), (q, k, v, segment_ids))
    return jax.lax.map(attend, parts).reshape(q.shape)


def find_segments(segment_ids: Array, group_size: int) -> Segments:
    """Returns the segments of rows `[R, T]`, in groups of so many."""
    num_tokens = segment_ids.size
    before = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
    is_token = (segment_ids > 0).reshape(-1)
    # A row's first token begins a segment whatever ended the row before.
    begins = ((segment_ids != before) & (segment_ids > 0)).reshape(-1)
    number = jnp.cumsum(begins) - 1
    size = -(-num_tokens // group_size) * group_size
    starts = jnp.nonzero(begins, size=size, fill_value=num_tokens)[0].astype(jnp.int32)
    lengths = jnp.zeros(size, jnp.int32).at[number].add(is_token.astype(jnp.int32))
    group = jnp.where(is_token, number // group_size, -1).reshape(*segment_ids.shape, 1, 1)
    return Segments(starts, lengths, group, group.max() + 1, number.reshape(segment_ids.shape))


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q: Array, k: Array, v: Array, sinks: Array | None, segments: Segments, shape: Shape) -> Array:
    forward = partial(_call_forward, (q, k, v), sinks, segments, shape, is_training=False)
    return _by_groups(lambda group: forward(group)[0][:1], segments, shape)[0]


def _attend_forward(
    q: Array, k: Array, v: Array, sinks: Array | None, segments: Segments, shape: Shape
) -> tuple[Array, tuple[Any, ...]]:
    forward = partial(_call_forward, (q, k, v), sinks, segments, shape, is_training=True)
    of_tokens, log_totals = forward(jnp.int32(0))
    of_tokens = _by_groups(lambda group: forward(group)[0], segments, shape, of_tokens)
    return of_tokens[0], ((q, k, v), sinks, segments, of_tokens, log_totals)


def _attend_backward(
    shape: Shape, residuals: tuple[Any, ...], grad: Array
) -> tuple[Array, Array, Array, Array | None, None]:
    inputs, sinks, segments, (attended, *totals), log_totals = residuals

    def backward(group: Array, log_totals: Sequence[Array]) -> tuple[Array, ...]:
        return _call_backward(inputs, segments, shape, group, log_totals, attended, grad.astype(attended.dtype))

    def again(group: Array) -> tuple[Array, ...]:
        # Kept for the first group only: later ones are rare.
        return backward(group, _call_forward(inputs, sinks, segments, shape, group, is_training=True)[1])

    grad_q, grad_k, grad_v = _by_groups(again, segments, shape, backward(jnp.int32(0), log_totals))
    if sinks is None:
        return grad_q, grad_k, grad_v, None, None
    # A sink has a score like a key, and a value of zero.
    mean_grad = jnp.sum(grad.astype(jnp.float32) * attended, axis=-1, keepdims=True)
    of_sinks = jnp.exp(sinks[:, None] - totals[0]) * mean_grad
    return grad_q, grad_k, grad_v, -jnp.sum(jnp.where(segments.group < 0, 0, of_sinks), axis=(0, 1, 3)), None


_attend.defvjp(_attend_forward, _attend_backward)


def _by_groups(
    call: Callable[[Array], tuple[Array, ...]],
    segments: Segments,
    shape: Shape,
    first: tuple[Array, ...] | None = None,
) -> tuple[Array, ...]:
    """Returns the call's results `[R, T, ...]` for each token's group: `first` are those of group 0, if at hand.

    What a call writes where it has no segment is left over in memory: it is never read, nor multiplied by zero.
    """
    first = call(jnp.int32(0)) if first is None else first
    fits = segments.lengths.max() <= shape.seq_len
    nothing = jnp.where(fits, 0.0, jnp.nan)
    pick = lambda group, new, old: jnp.where((segments.group == group) & fits, new, old)
    results = tuple(pick(0, x, nothing.astype(x.dtype)) for x in first)
    if segments.starts.size == shape.group_size:
        return results
    more = lambda group, results: tuple(map(partial(pick, group), call(group), results))
    return jax.lax.fori_loop(1, segments.num_groups, more, results)


def _call_forward(
    inputs: tuple[Array, Array, Array],
    sinks: Array | None,
    segments: Segments,
    shape: Shape,
    group: Array,
    *,
    is_training: bool,
) -> tuple[tuple[Array, ...], Sequence[Array]]:
    """Returns a group's outputs `[R, T, N, H]`, with sinks also its log normalisers `[R, T, N, 1]`; and these as the
    backward call takes them, where it is for training.
    """
    calls, (q, k, _) = load_calls(), inputs
    attended, *log_totals = calls._dot_product_attention_fwd_p.bind(
        *_in_parts(shape, *inputs),
        *_list_group(q, k, segments, shape, group),
        **_options(calls, "fwd", shape),
        is_training=is_training or sinks is not None,
    )
    attended = attended.reshape(q.shape)
    if sinks is None:
        return (attended,), log_totals
    # [group_size, N, seq_len]
    with_sinks = jnp.logaddexp(log_totals[0], sinks[:, None])
    own, totals = (_read_tokens(x, segments, shape, group) for x in (log_totals[0], with_sinks))
    return ((attended * jnp.exp(own - totals)).astype(q.dtype), totals), [with_sinks]


def _read_tokens(x: Array, segments: Segments, shape: Shape, group: Array) -> Array:
    """Returns what a group's array `[group_size, N, seq_len]` has for its tokens, `[R, T, N, 1]`."""
    index = jnp.arange(segments.number.size).reshape(segments.number.shape) - segments.starts[segments.number]
    return x[segments.number - group * shape.group_size, :, index][..., None]


def _call_backward(
    inputs: tuple[Array, Array, Array],
    segments: Segments,
    shape: Shape,
    group: Array,
    log_totals: Sequence[Array],
    attended: Array,
    grad: Array,
) -> tuple[Array, ...]:
    """Returns a group's gradients of q, k and v, of their shapes."""
    calls, (q, k, _) = load_calls(), inputs
    results = calls._dot_product_attention_bwd_p.bind(
        *_in_parts(shape, *inputs),
        *_list_group(q, k, segments, shape, group),
        *log_totals,
        *_in_parts(shape, attended, grad),
        **_options(calls, "bwd", shape),
    )
    return tuple(result.reshape(x.shape) for result, x in zip(results, inputs, strict=True))


def _in_parts(shape: Shape, *arrays: Array) -> tuple[Array, ...]:
    return tuple(x.reshape(shape.num_parts, shape.seq_len, *x.shape[2:]) for x in arrays)


def _list_group(q: Array, k: Array, segments: Segments, shape: Shape, group: Array) -> tuple[Array, ...]:
    """Returns the operands between the values and the results: no bias, lengths, offsets in numbers, no pages.

    An offset too many a part is what the call's shape leaves over; cuDNN reads the first `group_size + 1`.
    """
    of_group = lambda x: jax.lax.dynamic_slice(x, (group * shape.group_size,), (shape.group_size,))
    # A longer one is an error, which its results say; here it would be written beyond its room.
    lengths = jnp.minimum(of_group(segments.lengths), shape.seq_len).reshape(shape.num_parts, ROOM)
    num_tokens = segments.group.size
    starts = jnp.pad(of_group(segments.starts), (0, shape.num_parts), constant_values=num_tokens)
    starts = starts.reshape(shape.num_parts, ROOM + 1)
    q_offsets, k_offsets = (starts * (x.shape[2] * x.shape[3]) for x in (q, k))
    none = jnp.zeros(0, q.dtype)
    return none, lengths, lengths, q_offsets, k_offsets, none, none


def _options(calls: ModuleType, name: str, shape: Shape) -> dict[str, Any]:
    added = {key: None for key in _parameters(calls, name) if key in ADDED[1:]}
    return {
        "scale": shape.scale,
        "seed": 0,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),  # no bias, no gradient of it
        "mask_type": calls.MaskType.PADDING_CAUSAL,
        "layout": calls.AttentionLayout.BTNH.value,
        "sliding_window_length": shape.window,
        **added,
    }


def load_calls() -> ModuleType:
    """Returns JAX's module of cuDNN's attention; ImportError where there is none."""
    return importlib.import_module(MODULE)


def _parameters(calls: ModuleType, name: str) -> list[str]:
    return list(inspect.signature(getattr(calls, f"_dot_product_attention_{name}_cuda_lowering")).parameters)


def find_api_fault() -> str | None:
    """Returns how JAX's private calls differ from those that this file knows, None where they do not."""
    try:
        calls = load_calls()
        masks, layouts = calls.MaskType, calls.AttentionLayout
        found = {name: _parameters(calls, name) for name in KNOWN if getattr(calls, f"_dot_product_attention_{name}_p")}
        if not (hasattr(masks, "PADDING_CAUSAL") and hasattr(layouts, "BTNH")):
            return f"it needs masks and layouts that {MODULE} of JAX {jax.__version__} does not name"
    except (ImportError, AttributeError) as error:
        return f"it needs {MODULE}, and JAX {jax.__version__} has another: {error}"
    for name, known in KNOWN.items():
        if changed := set(known) ^ {key for key in found[name] if key not in ADDED}:
            return (
                f"it needs {MODULE} as it was, and in JAX {jax.__version__} {', '.join(sorted(changed))} of its "
                f"{name} call changed"
            )
    return None
