"""Attention: the module, and the types of the functions that it is given, see `engine/attention/`.

A token attends to the tokens of its own segment at or before it (within the sliding window, if any). Padding is
segment 0 and attends to padding only, so every row of scores has a finite maximum.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jax import Array

from realjax.core.axes import Constrain
from realjax.models.config import AttentionConfig, ModelConfig, RopeConfig
from realjax.models.layers import Linear, make_norm, make_param
from realjax.models.products import Products
from realjax.models.rope import apply_rope


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How a layer's scores are made of queries and keys, and which of them count."""

    window: int | None = None  # a token sees itself and the window-1 tokens before it
    softcap: float | None = None  # scores s are softcap * tanh(s / softcap)
    # Of scores, before the cap; None: head_dim**-0.5. Kernels apply it: a second factor of q would round it twice.
    scale: float | None = None

    def find_scale(self, head_dim: int) -> float:
        """Returns the factor of the products of queries and keys."""
        return head_dim**-0.5 if self.scale is None else self.scale


# Of all of them, `sinks_N` are float32 logits, each head's own in every softmax, beside those of the keys; or None.
# attention_fn(q_RTNH, k_RTKH, v_RTKH, segment_ids_RT, scoring, sinks_N) -> RTNH
AttentionFn = Callable[[Array, Array, Array, Array, Scoring, Array | None], Array]
# decoding_fn(q_BNH, k_BKHS, v_BKSH, lengths_B, scoring, sinks_N) -> BNH: token number `lengths` of each row, which the
# cache has already. With a window the cache is a ring: token t is at t mod S.
DecodingFn = Callable[[Array, Array, Array, Array, Scoring, Array | None], Array]
# attend_fn(q_RTNH, k_RTKH, v_RTKH, scoring, sinks_N) -> RTNH: with all else fixed; a cache may stand behind it.
AttendFn = Callable[[Array, Array, Array, Scoring, Array | None], Array]

# route_fn(ids_RTk) -> ids_RTk: the experts that tokens go to, of those that the router has chosen.
RouteFn = Callable[[Array], Array]


def keep_routes(ids: Array) -> Array:
    """Returns the router's choice."""
    return ids


@dataclass(frozen=True, kw_only=True)
class BlockContext:
    """What a block reads beside its rows `[R, T, D]`."""

    rotations: Mapping[RopeConfig, tuple[Array, Array]]  # cos and sin `[R, T, H/2]`
    segment_ids: Array  # [R, T] 0 on padding
    attend_fn: AttendFn
    constrain: Constrain
    products: Products
    layer_number: Array | None = None  # among the layers with experts
    route_fn: RouteFn = keep_routes

    @property
    def is_token(self) -> Array:
        """False on padding `[R, T]`."""
        return self.segment_ids > 0


class Attention(nnx.Module):
    """Multi-head attention with grouped key-value heads and rotary positions."""

    def __init__(self, sizes: ModelConfig, config: AttentionConfig) -> None:
        D, H = {"embed": sizes.hidden_size}, {"head_dim": sizes.head_dim}
        queries, keys = {"q_heads": sizes.num_q_heads, **H}, {"kv_heads": sizes.num_kv_heads, **H}
        self.q = Linear(D, queries, config.qkv_bias, sizes.find_adapter("q"))
        self.k = Linear(D, keys, config.qkv_bias, sizes.find_adapter("k"))
        self.v = Linear(D, keys, config.qkv_bias, sizes.find_adapter("v"))
        self.o = Linear(queries, D, config.o_bias, sizes.find_adapter("o"))
        q_dims, k_dims = (queries, keys) if config.qk_norm_whole else (H, H)
        self.q_norm = make_norm(q_dims, config.qk_norm) if config.qk_norm else None
        self.k_norm = make_norm(k_dims, config.qk_norm) if config.qk_norm else None
        self.sinks = make_param((sizes.num_q_heads,), ("q_heads",)) if config.sinks else None
        self.scoring = Scoring(window=config.window, softcap=config.softcap, scale=config.scale)
        self.rope = config.rope

    def project(self, x_RTD: Array, context: BlockContext) -> tuple[Array, Array, Array]:
        """Returns rotated q `[R, T, N, H]` and k, and v `[R, T, K, H]`."""
        q, k, v = (layer(x_RTD, context.products) for layer in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q, context.products), self.k_norm(k, context.products)
        rotate = lambda x: x if self.rope is None else apply_rope(x, *context.rotations[self.rope])
        q = context.constrain(rotate(q), ("rows", "time", "q_heads", "head_dim"))
        k = context.constrain(rotate(k), ("rows", "time", "kv_heads", "head_dim"))
        return q, k, context.constrain(v, ("rows", "time", "kv_heads", "head_dim"))

    def __call__(self, x_RTD: Array, context: BlockContext) -> Array:
        # Their gradients are sums over tokens, see `models/sums.py`.
        sinks = None if self.sinks is None else self.sinks[...].astype(jnp.float32)
        attended = context.attend_fn(*self.project(x_RTD, context), self.scoring, sinks)
        attended = context.constrain(attended, ("rows", "time", "q_heads", "head_dim"))
        return self.o(attended, context.products, "residual_time")
