"""The one decoder-only transformer: embedding, stacked blocks, final norm. Heads are in `heads.py`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from realjax.core.axes import Constrain
from realjax.core.batch import Batch
from realjax.core.trees import Tree
from realjax.models import sums
from realjax.models.attention import Attention, AttentionFn, BlockContext, RouteFn, keep_routes
from realjax.models.config import LayerKind, MLPConfig, ModelConfig, MoEConfig
from realjax.models.heads import cap_logits
from realjax.models.layers import Linear, make_norm, make_param, scale_by_number
from realjax.models.mlp import MLP
from realjax.models.moe import MoE
from realjax.models.products import Products
from realjax.models.rope import make_tables
from realjax.models.stacks import (
    Aux,
    BlockFn,
    Blocks,
    Layer,
    PerRow,
    RunLayersFn,
    Stacks,
    scan_layers,
    skip_empty,
    split_kinds,
)

TABLES = ("embed", "positions")  # what is looked up at the beginning, as a tree of parameters calls it
GatherFn = Callable[[str, Layer], Layer]  # (kind, layer) -> the layer's arrays as its block uses them
# (embed_fn, *ids_RT) -> embed_fn(*ids_RT), x_RTD: what tables have at the ids, one for each
LookUpFn = Callable[..., Array]


def take_as_it_is(kind: str, layer: Layer) -> Layer:
    """Returns a layer whose arrays are whole where they lie."""
    return layer


def look_up_alone(embed_fn: Callable[..., Array], *ids: Array) -> Array:
    """Returns what tables have whose rows are whole where they lie."""
    return embed_fn(*ids)


@dataclass(frozen=True, kw_only=True)
class Forward:
    """How a forward pass runs: all that a layout or a platform decides and the weights do not."""

    attention_fn: AttentionFn
    constrain: Constrain = Constrain()
    products: Products = Products()
    run_layers_fn: RunLayersFn = scan_layers
    gather_fn: GatherFn = take_as_it_is
    look_up_fn: LookUpFn = look_up_alone
    route_fn: RouteFn = keep_routes
    remat_fn: Callable[[BlockFn], BlockFn] = lambda block_fn: block_fn  # what the backward pass computes again


# The module of each kind of feed-forward. Its `list_terms` names what it returns as `Aux`.
FEED_FORWARDS: dict[type, type[Any]] = {MLPConfig: MLP, MoEConfig: MoE}


class Block(nnx.Module):
    """Attention and feed-forward with residuals, and norms where the kind of layer has them."""

    def __init__(self, sizes: ModelConfig, kind: LayerKind) -> None:
        make = lambda config: None if config is None else make_norm({"norm": sizes.hidden_size}, config)
        self.attn_norm = make(kind.attn_norm)
        self.attn = Attention(sizes, kind.mixer)
        self.attn_post_norm = make(kind.attn_post_norm)
        self.mlp_norm = make(kind.mlp_norm)
        self.mlp = FEED_FORWARDS[type(kind.feed_forward)](sizes, kind.feed_forward)
        self.mlp_post_norm = make(kind.mlp_post_norm)
        self.residual_scale = kind.residual_scale

    def __call__(self, x: Array, context: BlockContext) -> tuple[Array, Aux]:
        # Norms and residuals may be split along the row; projections read whole rows.
        constrain = context.constrain
        whole = lambda h: constrain(h, ("rows", "time", "act_embed"))
        split = lambda h: constrain(h, ("rows", "residual_time", "act_embed"))
        normed = lambda norm, h: h if norm is None else norm(h, context.products, "residual_time")
        attended = self.attn(whole(normed(self.attn_norm, x)), context)
        x = x + scale_by_number(normed(self.attn_post_norm, split(attended)), self.residual_scale)
        fed, terms = self.mlp(whole(normed(self.mlp_norm, x)), context)
        return x + scale_by_number(normed(self.mlp_post_norm, split(fed)), self.residual_scale), terms


class Embedding(nnx.Module):
    """A table `[V, D]` of tokens, or `[P, D]` of positions, whose rows are used `scale` times as large."""

    def __init__(self, num_rows: int, size: int, name: str, scale: float | None = None) -> None:
        self.table = make_param((num_rows, size), (name, "embed"))
        self.scale = scale

    def __call__(self, ids: Array) -> Array:
        rows = sums.look_up(self.table[...], ids)
        return rows if self.scale is None else rows * self.scale  # in their dtype, to which the scale is rounded


def _replay(routes: Array, number: Array | None, ids: Array) -> Array:
    """Returns the recorded experts of a layer where there are any, else the router's choice."""
    assert number is not None, "a layer with experts has a number"
    recorded = jnp.take(routes, number, axis=2).astype(ids.dtype)
    return jnp.where(recorded > 0, recorded - 1, ids)


class StackedKinds(nnx.Module):
    """The stacks of a model with several kinds of layer, each under its kind's name."""

    def __init__(self, stacks: Mapping[str, Block]) -> None:
        for name, stack in stacks.items():
            setattr(self, name, stack)


def read_rows(config: ModelConfig, batch: Batch, products: Products) -> PerRow:
    """Returns what every layer reads of packed rows `[R, T]`."""
    routes, words = config.routes, batch.get("routes")
    return replace(
        read_positions(config, batch["positions"], batch["segment_ids"], products),
        routes=None if routes is None or words is None else routes.unpack(words),
    )


def read_positions(config: ModelConfig, positions: Array, segment_ids: Array, products: Products) -> PerRow:
    """Returns what every layer reads of packed rows `[R, T]`."""
    return PerRow(make_tables(config.ropes, config.head_dim, positions, products), segment_ids)


def number_routed_layers(config: ModelConfig, kind: str) -> Array | None:
    """Returns the numbers of a kind's layers among those with experts `[L]`, None for a kind without."""
    if not isinstance(config.kinds[kind].feed_forward, MoEConfig):
        return None
    has_experts = [isinstance(config.kinds[name].feed_forward, MoEConfig) for name in config.order]
    return jnp.array([sum(has_experts[:i]) for i, name in enumerate(config.order) if name == kind], jnp.int32)


class Transformer(nnx.Module):
    """Tokens to final hidden states. `layers` holds the parameters of all blocks of a kind stacked on a leading dim.

    With several kinds, these are one below it by name. Empty layers are at the end of the stack, see `ModelConfig`.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size, "vocab", config.embed_scale)
        if config.learned_positions:
            self.positions = Embedding(config.max_positions, config.hidden_size, "positions")
        stacks = {name: self._make_stack(config, kind) for name, kind in config.kinds.items()}
        self.layers = StackedKinds(stacks) if len(stacks) > 1 else next(iter(stacks.values()))
        self.norm = make_norm({"norm": config.hidden_size}, config.norm)
        if not config.tied:
            out = {"score": 1} if config.is_critic else {"vocab": config.vocab_size}
            self.head = Linear({"embed": config.hidden_size}, out)

    def _make_stack(self, config: ModelConfig, kind: LayerKind) -> Block:
        num_layers = config.order.count(kind.name)
        stack = nnx.vmap(
            lambda _: Block(config, kind), axis_size=num_layers, transform_metadata={nnx.PARTITION_NAME: "layers"}
        )
        return stack(jnp.zeros(num_layers))

    @property
    def stacks(self) -> dict[str, Block]:
        """The stacked blocks of each kind."""
        kinds, layers = self.config.kinds, self.layers
        return {name: layers if isinstance(layers, Block) else getattr(layers, name) for name in kinds}

    def __call__(self, tokens: Array, positions: Array, segment_ids: Array, forward: Forward) -> tuple[Array, Aux]:
        """Returns the normed hidden states `[R, T, D]` of packed rows of tokens `[R, T]`, and the layers' terms."""
        blocks, stacks = self.make_stacks(forward)
        x = self.embed_rows(tokens, positions, forward)
        per_row = read_positions(self.config, positions, segment_ids, forward.products)
        x, terms = forward.run_layers_fn(blocks, self.config.order, stacks, x, per_row)
        return self.read_out(x, forward.products, "residual_time"), terms

    def read_out(self, x: Array, products: Products, time: str = "time") -> Array:
        """Returns what the head reads of the last layer's `[R, T, D]`: normed, and scaled as logits are to be."""
        hidden, config = self.norm(x, products, time), self.config
        return hidden if config.is_critic else scale_by_number(hidden, config.logit_scale)

    @property
    def tables(self) -> tuple[Embedding, ...]:
        """The tables whose rows are added up at the beginning: of tokens, and of positions where these are learned."""
        return (self.embed, self.positions) if self.config.learned_positions else (self.embed,)

    def embed_rows(self, tokens: Array, positions: Array, forward: Forward) -> Array:
        """Returns what the first layer reads of packed rows `[R, T]`: `[R, T, D]`."""
        ids = (tokens, positions)[: len(self.tables)]
        return forward.look_up_fn(partial(self._embed, forward.constrain), *ids)

    def embed_tokens(self, *ids: Array, constrain: Constrain = Constrain()) -> Array:  # noqa: B008
        """Returns what the first layer reads of tokens, and their positions where these are learned: `[B, T, D]`."""
        # Whole rows first: XLA aborts where a gather's result is split over an axis that its table is split over too.
        parts = [constrain(table(own_ids), ("rows", "time", "act_embed")) for table, own_ids in zip(self.tables, ids)]
        return reduce(jnp.add, parts)

    def make_stacks(self, forward: Forward, sinks: Tree | None = None) -> tuple[Blocks, Stacks]:
        """Returns the blocks and the stacked layers by kind.

        `sinks` are float32 arrays of the shapes of those of `layers` that are trained: where their gradients are
        summed, see `sums.collect`.
        """
        config, is_real = self.config, None
        if config.num_empty_layers:
            is_real = jnp.arange(config.num_stacked_layers) < config.num_layers
        blocks: dict[str, BlockFn] = {}
        stacks: dict[str, Layer] = {}
        for name, stack in self.stacks.items():
            graphdef, state = nnx.split(stack)
            blocks[name] = self._make_block(name, graphdef, forward)
            own_sinks = None if sinks is None else split_kinds(config, sinks)[name]
            numbers = number_routed_layers(config, name)
            stacks[name] = Layer(nnx.to_pure_dict(state), own_sinks, is_real, numbers)
        return blocks, stacks

    def _embed(self, constrain: Constrain, *ids: Array) -> Array:
        x = self.embed_tokens(*ids, constrain=constrain)
        return constrain(x, ("rows", "residual_time", "act_embed"))

    def _make_block(self, kind: str, graphdef: nnx.GraphDef[Block], forward: Forward) -> BlockFn:
        def block_fn(layer: Layer, x: Array, per_row: PerRow) -> tuple[Array, Aux]:
            layer = forward.gather_fn(kind, layer)
            params = layer.params if layer.sinks is None else sums.collect_tree(layer.params, layer.sinks)
            context = BlockContext(
                rotations=dict(zip(self.config.ropes, per_row.rotations)),
                segment_ids=per_row.segment_ids,
                layer_number=layer.number,
                attend_fn=lambda q, k, v, *how: forward.attention_fn(q, k, v, per_row.segment_ids, *how),
                constrain=forward.constrain,
                products=forward.products,
                route_fn=forward.route_fn if per_row.routes is None else partial(_replay, per_row.routes, layer.number),
            )
            return nnx.merge(graphdef, params)(x, context)

        return forward.remat_fn(skip_empty(block_fn))

    def head_kernel(self) -> Array:
        """Returns the head's matrix: `[D, V]`, the transposed embedding when tied, or `[D, 1]` for a critic."""
        return self.embed.table[...].T if self.config.tied else self.head.kernel[...]

    def next_logits(self, hidden_BD: Array, products: Products) -> Array:
        """Returns the float32 logits `[B, V]` of the tokens that follow these final hidden states."""
        if self.config.tied:
            logits = products.tied_logits(hidden_BD, self.embed.table[...])
        else:
            logits = jnp.matmul(hidden_BD, self.head.kernel[...], preferred_element_type=jnp.float32)
        return cap_logits(logits, self.config.logit_softcap)
