"""The one decoder-only transformer: embedding, stacked blocks, final norm. Heads are in `heads.py`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from realjax.core.axes import Constrain
from realjax.models import sums
from realjax.models.attention import AttendFn, Attention, AttentionFn
from realjax.models.config import ModelConfig
from realjax.models.layers import Linear, RMSNorm, make_param, rope_tables

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}

# block_fn(layer_params, x_RTD, per_row) -> x_RTD; run_layers_fn(block_fn, stacked_params, x_RTD, per_row) -> x_RTD.
# `per_row` is a tree of arrays with leading dim R that every block reads.
BlockFn = Callable[[Any, Array, Any], Array]
RunLayersFn = Callable[[BlockFn, Any, Array, Any], Array]


def scan_layers(block_fn: BlockFn, stacked: Any, x: Array, per_row: Any, *, unroll: bool = False) -> Array:
    """Runs the blocks one after another; one block is compiled, whatever their number, unless `unroll`.

    Unrolled, a layer's weights and what it keeps for the backward pass are not copied out of and into stacks.
    """
    return jax.lax.scan(lambda carry, layer: (block_fn(layer, carry, per_row), None), x, stacked, unroll=unroll)[0]


def skip_empty(block_fn: BlockFn) -> BlockFn:
    """Returns the block of `(params, is_real)`: where that is False, an identity, and no parameter has a gradient.

    It is computed all the same: the stages of a pipeline run one program, whose collectives all of them take part in.
    """

    def skipping(layer: Any, x: Array, per_row: Any) -> Array:
        params, is_real = layer
        return jnp.where(is_real, block_fn(params, x, per_row), x)

    return skipping


@dataclass(frozen=True, kw_only=True)
class Forward:
    """How a forward pass runs: all that a layout or a platform decides and the weights do not."""

    attention_fn: AttentionFn
    constrain: Constrain = Constrain()
    run_layers_fn: RunLayersFn = scan_layers
    remat: bool = False  # recompute each block in the backward pass instead of keeping its activations


class MLP(nnx.Module):
    """Gated feed-forward: down(act(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        D, F = {"embed": config.hidden_size}, {"ffn": config.ffn_size}
        self.gate = Linear(D, F, config.mlp_bias)
        self.up = Linear(D, F, config.mlp_bias)
        self.down = Linear(F, D, config.mlp_bias)
        self.activation = config.activation

    def __call__(self, x_RTD: Array, constrain: Constrain) -> Array:
        hidden = ACTIVATIONS[self.activation](self.gate(x_RTD)) * self.up(x_RTD)
        return self.down(constrain(hidden, ("rows", "time", "act_ffn")), merge_rows=not constrain.splits_residuals)


class Block(nnx.Module):
    """Pre-norm attention and MLP with residuals."""

    def __init__(self, config: ModelConfig) -> None:
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def __call__(self, x: Array, cos: Array, sin: Array, attend_fn: AttendFn, constrain: Constrain) -> Array:
        # Norms and residuals may be split along the row; projections read whole rows.
        whole = lambda h: constrain(h, ("rows", "time", "act_embed"))
        split = lambda h: constrain(h, ("rows", "residual_time", "act_embed"))
        merge_rows = not constrain.splits_residuals
        x = x + split(self.attn(whole(self.attn_norm(x, merge_rows=merge_rows)), cos, sin, attend_fn, constrain))
        return x + split(self.mlp(whole(self.mlp_norm(x, merge_rows=merge_rows)), constrain))


class Embedding(nnx.Module):
    """The token table `[V, D]`."""

    def __init__(self, config: ModelConfig) -> None:
        self.table = make_param((config.vocab_size, config.hidden_size), ("vocab", "embed"))

    def __call__(self, tokens: Array) -> Array:
        return sums.look_up(self.table[...], tokens)


class Transformer(nnx.Module):
    """Tokens to final hidden states. `layers` holds every block's parameters stacked on a leading dim.

    Empty layers are at the end of the stack, see `ModelConfig`.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.embed = Embedding(config)
        stack = nnx.vmap(
            lambda _: Block(config),
            axis_size=config.num_stacked_layers,
            transform_metadata={nnx.PARTITION_NAME: "layers"},
        )
        self.layers = stack(jnp.zeros(config.num_stacked_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        if not config.tied:
            out = {"score": 1} if config.is_critic else {"vocab": config.vocab_size}
            self.head = Linear({"embed": config.hidden_size}, out)

    def __call__(
        self,
        tokens: Array,
        positions: Array,
        segment_ids: Array,
        forward: Forward,
        sinks: Any = None,
    ) -> Array:
        """Returns the normed hidden states `[R, T, D]` of packed rows of tokens `[R, T]`.

        `sinks` are float32 arrays of the shapes of `layers`: where its gradients are summed, see `sums.collect`.
        """
        cos, sin = rope_tables(self.config.rope, self.config.head_dim, positions)
        graphdef, state = nnx.split(self.layers)
        stacked: Any = (nnx.to_pure_dict(state), sinks)

        def block_fn(layer: Any, x: Array, per_row: Any) -> Array:
            (layer, sinks), (cos, sin, segment_ids) = layer, per_row
            layer = layer if sinks is None else jax.tree.map(sums.collect, layer, sinks)
            attend_fn = lambda q, k, v: forward.attention_fn(q, k, v, segment_ids, self.config.sliding_window)
            return nnx.merge(graphdef, layer)(x, cos, sin, attend_fn, forward.constrain)

        # Whole rows first: XLA aborts where a gather's result is split over an axis that its table is split over too.
        x = forward.constrain(self.embed(tokens), ("rows", "time", "act_embed"))
        x = forward.constrain(x, ("rows", "residual_time", "act_embed"))
        run_fn: BlockFn = block_fn
        if self.config.num_empty_layers:
            is_real = jnp.arange(self.config.num_stacked_layers) < self.config.num_layers
            run_fn, stacked = skip_empty(block_fn), (stacked, is_real)
        run_fn = jax.checkpoint(run_fn) if forward.remat else run_fn
        x = forward.run_layers_fn(run_fn, stacked, x, (cos, sin, segment_ids))
        normed = self.norm(x, merge_rows=not forward.constrain.splits_residuals)
        return forward.constrain(normed, ("rows", "time", "act_embed"))

    def head_kernel(self) -> Array:
        """Returns the head's matrix: `[D, V]`, the transposed embedding when tied, or `[D, 1]` for a critic."""
        return self.embed.table[...].T if self.config.tied else self.head.kernel[...]

    def next_logits(self, hidden_BD: Array) -> Array:
        """Returns the float32 logits `[B, V]` of the tokens that follow these final hidden states."""
        if not self.config.tied:
            return jnp.matmul(hidden_BD, self.head.kernel[...], preferred_element_type=jnp.float32)
        # The table as it lies, on the left: with few rows XLA's CPU backend takes half as long again for the transposed
        # table, which is what it makes of this without the barriers.
        barrier = jax.lax.optimization_barrier
        table = self.embed.table[...]
        return barrier(jnp.matmul(table, barrier(hidden_BD.T), preferred_element_type=jnp.float32)).T
