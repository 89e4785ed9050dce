"""As `blocked`, but weights are kept for the backward pass: what a CPU does best.

XLA's CPU backend computes equal products once, so the scores that `blocked` would compute again in its backward pass
are kept in any case, and with them the mask and the exponentials are all that it does twice.
"""

from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from jax import Array

from realjax.engine.attention.blocked import AttendFn, make_blocked, make_scores, weigh_keys


def sum_queries(scores: Array, x: Array) -> Array:
    """Returns the sum over queries of scores `[R, K, Q, S]` times x `[R, K, Q, H]`: `[R, K, S, H]`.

    It is for CPUs: of the factors the left one is transposed, which x is in half the time. The barrier keeps it there.
    """
    return jax.lax.optimization_barrier(jnp.einsum("RKQH,RKQS->RKHS", x, scores)).swapaxes(2, 3)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q: Array, k: Array, v: Array, mask: Array, sinks: Array | None, softcap: float | None) -> Array:
    return _forward(q, k, v, mask, sinks, softcap)[0]


def _forward(
    q: Array, k: Array, v: Array, mask: Array, sinks: Array | None, softcap: float | None
) -> tuple[Array, tuple[Array | None, ...]]:
    weights, total, largest = weigh_keys(q, k, mask, sinks, softcap)
    summed = jnp.einsum("RKQS,RKSH->RKQH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    attended, inverse = (summed / total).astype(v.dtype), 1 / total
    share = None if sinks is None else jnp.exp(sinks - largest) * inverse
    return attended, (q, k, v, weights, inverse, attended, share)


def _backward(
    softcap: float | None, residuals: tuple[Array, ...], grad: Array
) -> tuple[Array, Array, Array, None, Array | None]:
    q, k, v, weights, inverse, attended, share = residuals
    # Over the sums here, where a query has H numbers, and not a number a key.
    grad32 = grad.astype(jnp.float32)
    mean_grad = jnp.sum(grad32 * attended, axis=-1, keepdims=True)
    grad = (grad32 * inverse).astype(v.dtype)
    grad_weights = jnp.einsum("RKQH,RKSH->RKQS", grad, v, preferred_element_type=jnp.float32)
    grad_scores = weights * (grad_weights - mean_grad * inverse)
    if softcap is not None:
        grad_scores *= 1 - jnp.square(make_scores(q, k, softcap) / softcap)
    grad_scores = grad_scores.astype(q.dtype)
    grad_q = jnp.einsum("RKQS,RKSH->RKQH", grad_scores, k)
    grad_k, grad_v = sum_queries(grad_scores, q), sum_queries(weights.astype(v.dtype), grad)
    # A sink has a score like a key, and a value of zero.
    grad_sinks = None if share is None else -jnp.sum(share * mean_grad, axis=0)
    return grad_q, grad_k, grad_v, None, grad_sinks


_attend.defvjp(_forward, _backward)
keeping_attention = make_blocked(cast(AttendFn, _attend))
