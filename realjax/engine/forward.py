"""One forward pass in one layout: parameters and a batch in, the outputs a loss or a caller reads out."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array

from realjax.core.axes import Rules, make_constrain, rows_per_device, tree_shardings
from realjax.core.batch import Batch
from realjax.core.compute import Compute
from realjax.core.draw import Draw
from realjax.core.layout import Layout
from realjax.core.metrics import Mean
from realjax.core.trees import Tree
from realjax.engine.attention.choose import Case, make_attention
from realjax.engine.pipeline import make_run_layers
from realjax.engine.products import make_products, unrolls_layers
from realjax.models import heads
from realjax.models.build import Model
from realjax.models.sums import collect
from realjax.models.transformer import Forward, Transformer


class OutputsFn(Protocol):
    """A forward pass up to a head."""

    def __call__(
        self, params: Tree, batch: Batch, sinks: Tree | None = None
    ) -> tuple[Mapping[str, Array], Mapping[str, Mean]]:
        """Returns the head's outputs, and the terms that layers add to the loss, as means over tokens and layers."""
        ...


def make_compute_copy(model: Model, rules: Rules, layout: Layout, dtype: jnp.dtype) -> Callable[[Tree], Tree]:
    """Returns `fn(master) -> params`: cast to the compute dtype, then spread as the layout's rules say.

    The cast comes first, so that what ZeRO gathers from its shards is half as many bytes in bf16.
    """
    shardings = tree_shardings(model.axes, model.abstract, rules, layout)

    def compute_copy(master: Tree) -> Tree:
        cast = jax.tree.map(lambda x: x.astype(dtype), master)
        return jax.tree.map(jax.lax.with_sharding_constraint, cast, shardings)

    return compute_copy


def make_outputs(
    model: Model,
    head: str,
    rules: Rules,
    layout: Layout,
    compute: Compute,
    draw: Draw = Draw(),  # noqa: B008 - frozen
    needs_entropy: bool = False,
) -> OutputsFn:
    """Returns `fn(params, batch, sinks=None) -> (outputs, terms)`: outputs of the head as in `core.loss.Loss`, terms of
    the loss as in `models.stacks`, as means over the tokens and the layers that have them.

    Params are in the compute dtype. Their gradients are those of `sinks`, float32 arrays of their shapes that are not
    read, where given, see `models.sums.collect`.
    Where `draw` keeps a set of tokens, head `logprobs` reads it from the batch's key `kept`. A key `targets` `[R, P]`
    limits that head to these tokens, see `heads.token_logprobs`.
    """
    forward = _make_forward(model, rules, layout, compute)
    head_fn = _make_head(head, draw, needs_entropy, forward, partial(_chunk_len, model, layout, compute))

    def outputs(
        params: Tree, batch: Batch, sinks: Tree | None = None
    ) -> tuple[Mapping[str, Array], Mapping[str, Mean]]:
        inputs = batch["tokens"], batch["positions"], batch["segment_ids"]
        layer_sinks = None if sinks is None else sinks["layers"]
        hidden, sums = _bind(model, params, sinks)(*inputs, forward, layer_sinks)
        terms = {name: Mean(sums[name], weight) for name, weight in term_weights(model, batch).items()}
        # Bound once more, so that the two gradients of a tied table meet in its sink.
        return head_fn(hidden, _bind(model, params, sinks).head_kernel(), batch), terms

    return outputs


def _make_head(
    head: str, draw: Draw, needs_entropy: bool, forward: Forward, chunk_len_fn: Callable[..., int]
) -> Callable[[Array, Array, Batch], Mapping[str, Array]]:
    """Returns `fn(hidden, kernel, batch) -> outputs`."""
    matmul = forward.products.matmul
    make_chunks = partial(heads.Chunks, constrain=forward.constrain, matmul=matmul)

    def outputs(hidden: Array, kernel: Array, batch: Batch) -> Mapping[str, Array]:
        tokens, segment_ids = batch["tokens"], batch["segment_ids"]
        if head == "values":
            return {"values": heads.token_values(hidden, kernel, matmul)}
        if head == "logprobs":
            targets = batch.get("targets")
            num_targets = batch.row_len if targets is None else targets.shape[1]
            return heads.token_logprobs(
                hidden,
                kernel,
                tokens,
                segment_ids,
                # Half: XLA's CPU backend lets the backward pass not reuse the logits' memory of the forward pass.
                make_chunks(size=chunk_len_fn(batch, num_targets, heads.CHUNK_BYTES // 2)),
                heads.Wanted(
                    draw=draw,
                    kept=None if draw.kept is None else batch["kept"],
                    needs_entropy=needs_entropy,
                    targets=targets,
                ),
            )
        nll, logprobs = heads.weighted_nll(
            hidden,
            kernel,
            tokens,
            segment_ids,
            batch["loss_mask"],
            make_chunks(size=chunk_len_fn(batch, batch.row_len)),
        )
        return {"nll": nll, "logprobs": logprobs}

    return outputs


def term_weights(model: Model, batch: Batch) -> dict[str, Array]:
    """Returns for each term that layers add to the loss how many tokens of the batch have it, times layers, float32."""
    num_layers = model.count_terms()
    return {name: count * jnp.sum(batch["segment_ids"] > 0, dtype=jnp.float32) for name, count in num_layers.items()}


def _bind(model: Model, params: Tree, sinks: Tree | None) -> Transformer:
    """Returns the module whose parameters have their gradients in the sinks; `layers` looks after its own."""
    if sinks is None:
        return model.bind(params)
    return model.bind({k: v if k == "layers" else jax.tree.map(collect, v, sinks[k]) for k, v in params.items()})


def _make_forward(model: Model, rules: Rules, layout: Layout, compute: Compute) -> Forward:
    unroll = unrolls_layers(layout, remat=compute.remat) if compute.unroll is None else compute.unroll
    case = Case.of("rows", model.config, layout, compute.array_dtype)
    return Forward(
        constrain=make_constrain(rules, layout),
        products=make_products(rules, layout),
        attention_fn=make_attention(compute.attention, case, layout.strategy.tp, compute.max_segment_len),
        run_layers_fn=make_run_layers(layout, unroll=unroll),
        remat=compute.remat,
    )


def _chunk_len(
    model: Model,
    layout: Layout,
    compute: Compute,
    batch: Batch,
    num_positions: int,
    max_bytes: int = heads.CHUNK_BYTES,
) -> int:
    """Returns how many of a row's positions are one chunk of the head: by the option, or by memory."""
    rows = max(1, rows_per_device(batch.num_rows, layout))
    if compute.loss_chunk_tokens is not None:
        return heads.chunk_len(num_positions, rows * layout.strategy.dp, 1, 4 * compute.loss_chunk_tokens)
    vocab_per_device = max(1, model.config.vocab_size // (layout.strategy.tp * layout.strategy.pp))
    return heads.chunk_len(num_positions, rows, vocab_per_device, max_bytes)
