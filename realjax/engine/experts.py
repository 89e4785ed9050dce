"""Experts that devices share: tokens come to the devices that have theirs, and what these make of them is summed.

Nothing is dropped, and no shape depends on where tokens go. A device runs the pairs of a token and an expert that are
its own in turns of so many: their number alone decides how often, the first turn is most often the last.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from realjax.core.trees import Tree
from realjax.engine.dispatch import find_dispatch
from realjax.engine.manual_axes import find_share, gather_tokens, sum_tokens
from realjax.models.products import ExpertsFn, Routed

ROOM = 1.25  # of a turn: times the pairs that a device has when all have as many
FEW_PAIRS = 2**8  # are run at once, whoever they are of: in less time than it takes to read the kernels
WORTHWHILE = 2**20  # bytes that must be saved for the time that finding out who needs what takes


def share_experts(fn: ExpertsFn, axes: tuple[str, ...], *, can_send: bool) -> ExpertsFn:
    """Returns `fn` of a device's own tokens, where those along `axes` have tokens each, and along the first of them
    share the experts.

    Where they `can_send` what is another's alone, and it saves much, they do; else all of them get all tokens.
    """

    def of_each(routed: Routed, params: Tree) -> Array:
        (part, num_parts), num_own = find_share(), len(jax.tree.leaves(params)[0])
        x, ids, weights = (leaf.reshape(-1, leaf.shape[-1]) for leaf in (routed.x, routed.ids, routed.weights))
        is_sent = can_send and saved_bytes(x, ids.shape[1], num_parts) >= WORTHWHILE
        dispatch, rest = (find_dispatch(ids, num_own), axes[1:]) if is_sent else (None, axes)

        def spread(x: Array) -> Array:
            x = dispatch.spread(x) if dispatch else x
            return gather_tokens(x, rest) if rest else x

        # Where nothing came there is 0, which is no expert's number now. Another device's is none here either.
        own = spread(ids + 1) - 1 - part * num_own
        own = jnp.where((own >= 0) & (own < num_own), own, num_own)
        most = max(FEW_PAIRS, math.ceil(ROOM * own.size / num_parts))
        y = run_in_turns(fn, Routed(spread(x), own, spread(weights)), params, most)
        y = sum_tokens(y, rest) if rest else y
        return (dispatch.collect(y) if dispatch else y).reshape(routed.x.shape)

    return of_each


def saved_bytes(x: Array, num_chosen: int, num_parts: int) -> float:
    """Returns the bytes of tokens `[n, D]` that a device need not send, there and back, where each goes to the devices
    of its experts alone, which it chooses alike: of the others, (1 - 1/P)^k have none of its k.
    """
    return 2 * x.size * x.dtype.itemsize * (num_parts - 1) * (1 - 1 / num_parts) ** num_chosen


def run_in_turns(fn: ExpertsFn, routed: Routed, params: Tree, most: int) -> Array:
    """Returns `fn` of tokens `[n, ...]`, `most` pairs at a time; pairs without an expert have no turn."""
    if routed.ids.size <= most:
        return fn(jax.tree.map(lambda x: x[None], routed), params)[0]
    return _run_in_turns(fn, most, routed.x, routed.ids, routed.weights, params)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run_in_turns(fn: ExpertsFn, most: int, x: Array, ids: Array, weights: Array, params: Tree) -> Array:
    pairs, num_turns = _find_pairs(ids, most, params)

    def add(turn: Array, sums: Array) -> Array:
        at, token = _take_turn(pairs, turn, most, ids)
        y = fn(_route(x, ids, weights, at, token), params)[0]
        return sums.at[token].add(y.astype(jnp.float32), mode="drop")

    return jax.lax.fori_loop(0, num_turns, add, jnp.zeros(x.shape, jnp.float32)).astype(x.dtype)


def _turns_forward(fn: ExpertsFn, most: int, *args: Any) -> tuple[Array, tuple[Any, ...]]:
    return _run_in_turns(fn, most, *args), args


def _turns_backward(fn: ExpertsFn, most: int, args: tuple[Any, ...], grad: Array) -> tuple[Array, None, Array, Tree]:
    """Runs each turn again: what is kept of it between the passes is nothing."""
    x, ids, weights, params = args
    pairs, num_turns = _find_pairs(ids, most, params)

    def add(turn: Array, sums: tuple[Array, Array, Tree]) -> tuple[Array, Array, Tree]:
        at, token = _take_turn(pairs, turn, most, ids)
        routed = _route(x, ids, weights, at, token)
        run = lambda x, weights, params: fn(Routed(x, routed.ids, weights), params)
        of_x, of_weights, of_params = jax.vjp(run, routed.x, routed.weights, params)[1](grad[token][None])
        return (
            sums[0].at[token].add(of_x[0].astype(jnp.float32), mode="drop"),
            sums[1].at[at].set(of_weights[0, :, 0], mode="drop"),
            jax.tree.map(lambda total, own: total + own.astype(jnp.float32), sums[2], of_params),
        )

    zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
    start = zeros(x), zeros(weights).reshape(-1), jax.tree.map(zeros, params)
    of_x, of_weights, of_params = jax.lax.fori_loop(0, num_turns, add, start)
    of_params = jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), of_params, params)
    return of_x.astype(x.dtype), None, of_weights.reshape(weights.shape), of_params


_run_in_turns.defvjp(_turns_forward, _turns_backward)


def _find_pairs(ids: Array, most: int, params: Tree) -> tuple[Array, Array]:
    """Returns the numbers of the pairs that have an expert, in whole turns of which the last is filled up with one
    beyond all, and how many turns have any."""
    has_expert = ids.reshape(-1) < len(jax.tree.leaves(params)[0])
    size = -(-ids.size // most) * most
    pairs = jnp.nonzero(has_expert, size=size, fill_value=ids.size)[0]
    return pairs, -(-jnp.sum(has_expert, dtype=jnp.int32) // most)


def _take_turn(pairs: Array, turn: Array, most: int, ids: Array) -> tuple[Array, Array]:
    """Returns the numbers of a turn's pairs, and of their tokens."""
    at = jax.lax.dynamic_slice_in_dim(pairs, turn * most, most)
    return at, at // ids.shape[1]


def _route(x: Array, ids: Array, weights: Array, at: Array, token: Array) -> Routed:
    """Returns pairs as tokens of one expert each."""
    take = lambda x, index: x.at[index].get(mode="fill", fill_value=0)
    own = ids.reshape(-1).at[at].get(mode="fill", fill_value=jnp.iinfo(ids.dtype).max)
    return Routed(take(x, token)[None], own[None, :, None], take(weights.reshape(-1), at)[None, :, None])
