"""One forward pass in one layout: parameters and a batch in, the outputs a loss or a caller reads out."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array

from realjax.core.axes import Rules, make_constrain, rows_per_device, size_per_device, tree_shardings
from realjax.core.batch import Batch
from realjax.core.compute import Compute
from realjax.core.layout import Layout
from realjax.core.loss import Readout
from realjax.core.metrics import Load, Mean
from realjax.core.trees import Tree, flatten_paths, map_paths
from realjax.engine.attention.cases import Case
from realjax.engine.attention.choose import make_attention
from realjax.engine.pipeline import make_run_layers
from realjax.engine.products import adds_in_place, chunk_bytes, make_products, unrolls_layers
from realjax.engine.shards import Shards, keep_shards, make_shards
from realjax.engine.totals import AddFn, add_after, add_in_place
from realjax.models import heads
from realjax.models.build import Model
from realjax.models.products import MatmulFn
from realjax.models.stacks import Aux, Blocks, Stacks, scan_layers
from realjax.models.sums import collect_tree
from realjax.models.transformer import Forward, Transformer, read_rows


class OutputsFn(Protocol):
    """A forward pass up to a head."""

    def __call__(
        self, params: Tree, batch: Batch, sinks: Tree | None = None
    ) -> tuple[Mapping[str, Array], Mapping[str, Mean | Load]]:
        """Returns the head's outputs, and the terms that layers add to the loss, as means over tokens and layers."""
        ...


def make_compute_copy(
    model: Model, rules: Rules, layout: Layout, dtype: jnp.dtype, stored: Rules | None = None
) -> Callable[[Tree], Tree]:
    """Returns `fn(master) -> params`: cast to the compute dtype, then spread as the layout's rules say.

    The cast comes first, so that what ZeRO gathers from its shards is half as many bytes in bf16: XLA is told so where
    the masters are spread by `stored` rules.
    """
    trees = [tree_shardings(model.axes, model.abstract, r, layout) for r in (stored or rules, rules)]
    # What is not trained has no masters: it lies as the layers use it.
    trees[0] = model.take_trained(trees[0])

    def compute_copy(master: Tree) -> Tree:
        copy = map_paths(lambda path, x: x.astype(model.copy_dtype(path, dtype)), master)
        for places in map(flatten_paths, trees):
            place = lambda path, x, to=places: jax.lax.with_sharding_constraint(x, to[path]) if path in to else x
            copy = map_paths(place, copy)
        return copy

    return compute_copy


class ForwardParts:
    """A forward pass up to a head, in parts: layers are run between `embed` and `read_out`.

    Params are in the compute dtype. Gradients of those that are trained are those of `sinks`, float32 arrays of
    their shapes that are not read, where given, see `models.sums.collect`.
    Where the readout's draw keeps a set of tokens, head `logprobs` reads it from the batch's key `kept`, and where it
    compares, from `teacher_ids` and `teacher_logprobs`. A key `targets` `[R, P]` limits that head, `choices` and `nll`
    to these tokens, see `heads.Wanted`.
    """

    def __init__(self, model: Model, readout: Readout, rules: Rules, layout: Layout, compute: Compute) -> None:
        self.model, self._shards = model, make_shards(model, rules, layout)
        unroll = unrolls_layers(layout, remat=compute.remat) if compute.unroll is None else compute.unroll
        self.forward = _make_forward(model, rules, layout, compute, self._shards, unroll)
        self.add_gradients: AddFn = add_in_place if adds_in_place(layout, unroll=unroll) else add_after
        chunks_fn = _make_chunks_fn(model, rules, layout, compute, self.forward)
        self._head_fn = _make_head(readout, self.forward.products.matmul, chunks_fn)

    def embed(self, params: Tree, batch: Batch, sinks: Tree | None = None) -> Array:
        """Returns what the first layer reads, `[R, T, D]`; `sinks` of the tables at least."""
        return _bind(self.model, params, sinks).embed_rows(batch["tokens"], batch["positions"], self.forward)

    def make_stacks(self, params: Tree, sinks: Tree | None = None) -> tuple[Blocks, Stacks]:
        """Returns the blocks and the stacked layers, by kind; `sinks` of `layers`."""
        return self.model.bind(params).make_stacks(self.forward, sinks)

    def read_out(self, params: Tree, x: Array, batch: Batch, sinks: Tree | None = None) -> Mapping[str, Array]:
        """Returns the head's outputs of what the last layer gives, `[R, T, D]`; `sinks` of all but the layers."""
        hidden = _bind(self.model, params, sinks).read_out(x, self.forward.products, "residual_time")
        # Bound once more, so that the two gradients of a tied table meet in its sink.
        whole = self._shards.gather_outer(params, sinks) if self._shards else (params, sinks)
        return self._head_fn(hidden, _bind(self.model, *whole).head_kernel(), batch)


def make_outputs(parts: ForwardParts, layout: Layout) -> OutputsFn:
    """Returns `fn(params, batch, sinks=None) -> (outputs, terms)`: outputs of the head as in `core.loss.Loss`, terms of
    the loss as in `models.stacks`, as means over the tokens and the layers that have them.
    """
    model, run_layers_fn = parts.model, make_run_layers(layout, parts.forward.run_layers_fn)

    def outputs(
        params: Tree, batch: Batch, sinks: Tree | None = None
    ) -> tuple[Mapping[str, Array], Mapping[str, Mean | Load]]:
        blocks, stacks = parts.make_stacks(params, None if sinks is None else sinks["layers"])
        x = parts.embed(params, batch, sinks)
        per_row = read_rows(model.config, batch, parts.forward.products)
        x, sums = run_layers_fn(blocks, model.config.order, stacks, x, per_row)
        return parts.read_out(params, x, batch, sinks), make_terms(model, sums, batch)

    return outputs


def _make_head(
    readout: Readout, matmul: MatmulFn, chunks_fn: Callable[..., heads.Chunks]
) -> Callable[[Array, Array, Batch], Mapping[str, Array]]:
    """Returns `fn(hidden, kernel, batch) -> outputs`; hidden states may be split along the row."""

    def outputs(hidden: Array, kernel: Array, batch: Batch) -> Mapping[str, Array]:
        tokens, segment_ids, targets = batch["tokens"], batch["segment_ids"], batch.get("targets")
        if readout.head == "values":
            return {"values": heads.token_values(hidden, kernel, matmul)}
        if readout.head in ("logprobs", "choices"):
            wanted = heads.Wanted(
                draw=readout.draw,
                kept=None if readout.draw.kept is None else batch["kept"],
                needs_entropy=readout.needs_entropy,
                targets=targets,
                num_choices=readout.num_choices,
                compare_fn=readout.compare_fn,
                teacher=(batch["teacher_ids"], batch["teacher_logprobs"]) if readout.compare_fn else None,
            )
            chunks = chunks_fn(batch, None if targets is None else targets.shape[1], is_kept=True)
            return heads.token_logprobs(hidden, kernel, tokens, segment_ids, chunks, wanted)
        chunks = chunks_fn(batch, None if targets is None else targets.shape[1], is_kept=False)
        weights = batch["loss_mask"]
        nll, logprobs = heads.weighted_nll(hidden, kernel, tokens, segment_ids, weights, chunks, targets)
        return {"nll": nll, "logprobs": logprobs}

    return outputs


def make_terms(model: Model, sums: Aux, batch: Batch) -> dict[str, Mean | Load]:
    """Returns what layers add to the loss or report, of their sums over a batch's tokens."""
    weights = term_weights(model, batch)
    return {name: Load(x) if x.ndim else Mean(x, weights[name]) for name, x in sums.items()}


def term_weights(model: Model, batch: Batch) -> dict[str, Array]:
    """Returns for each term of the layers how many tokens of the batch have it, times layers, float32."""
    num_layers = model.count_terms()
    return {name: count * jnp.sum(batch["segment_ids"] > 0, dtype=jnp.float32) for name, count in num_layers.items()}


def _bind(model: Model, params: Tree, sinks: Tree | None) -> Transformer:
    """Returns the module whose parameters have their gradients in the sinks; `layers` looks after its own."""
    outer = {k: sink for k, sink in (sinks or {}).items() if k != "layers"}
    return model.bind({k: collect_tree(v, outer[k]) if k in outer else v for k, v in params.items()})


def _make_forward(
    model: Model, rules: Rules, layout: Layout, compute: Compute, shards: Shards | None, unroll: bool
) -> Forward:
    case = Case.of("rows", model.config, layout, compute.array_dtype)
    forward = Forward(
        constrain=make_constrain(rules, layout),
        products=make_products(rules, layout),
        attention_fn=make_attention(compute.attention, case, layout, compute.max_segment_len),
        run_layers_fn=partial(scan_layers, unroll=unroll),
    )
    if shards:
        forward = replace(forward, gather_fn=shards.gather, look_up_fn=shards.look_up, remat_fn=keep_shards)
    return replace(forward, remat_fn=jax.checkpoint) if compute.remat else forward


def _make_chunks_fn(
    model: Model, rules: Rules, layout: Layout, compute: Compute, forward: Forward
) -> Callable[..., heads.Chunks]:
    """Returns `fn(batch, num_targets, is_kept) -> chunks`: as long as the option says, or as memory allows.

    Of `num_targets` positions a row, or of all (None); `is_kept` as for `chunk_bytes`.
    """
    vocab_per_device = size_per_device("act_vocab", model.config.vocab_size, rules, layout)

    def make_chunks(batch: Batch, num_targets: int | None, is_kept: bool) -> heads.Chunks:
        parts = 1 if num_targets else batch.row_len // size_per_device("residual_time", batch.row_len, rules, layout)
        given = {"softcap": model.config.logit_softcap, "constrain": forward.constrain, "products": forward.products}
        given["vocab_parts"] = model.config.vocab_size // vocab_per_device
        chunks = partial(heads.Chunks, parts=parts, **given)
        chunk_len = partial(heads.chunk_len, num_targets or batch.row_len, parts=parts)
        rows = max(1, rows_per_device(batch.num_rows, layout))
        if compute.loss_chunk_tokens is not None:
            return chunks(size=chunk_len(rows * layout.strategy.dp, 1, 4 * compute.loss_chunk_tokens))
        return chunks(size=chunk_len(rows, vocab_per_device, chunk_bytes(layout, is_kept=is_kept)))

    return make_chunks
