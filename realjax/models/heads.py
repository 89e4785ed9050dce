"""From hidden states to log-probabilities and scores, without ever holding `[tokens, V]` of a whole batch.

Results are aligned with the token they speak of: entry t is about `tokens[t]` given the tokens of its segment before
it, and is 0 at the first token of a segment and on padding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from jax import Array

from realjax.core.axes import Constrain
from realjax.core.draw import REMOVED, Draw
from realjax.core.largest import largest
from realjax.core.loss import CompareFn
from realjax.core.segments import move_to_next, move_to_previous
from realjax.models.products import MatmulFn, Products
from realjax.models.sums import collect, matmul

# Largest float32 logits one chunk may hold on one device.
CHUNK_BYTES = 1 << 28
# The id of all tokens that are not among a token's choices: beyond the rows of any head.
OTHERS = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """How logits are made: of how many positions at once, which divides the row, and split and multiplied how.

    Where hidden states come in `parts` along the row, a chunk is of as many positions of each. So it is gathered, and
    its gradient summed, by each device for the part that it has. `softcap` is that of the model. The vocabulary lies in
    `vocab_parts` on devices. `dim` is the name of the dim of positions.
    """

    size: int
    parts: int = 1
    vocab_parts: int = 1
    dim: str = "time"
    softcap: float | None = None
    constrain: Constrain = Constrain()
    products: Products = Products()

    def split(self, x: Array) -> Array:
        """`[R, T, ...]` -> `[T/size, R, size, ...]`: chunks along the row, so that rows stay where they are."""
        R, T = x.shape[:2]
        chunks = x.reshape(R, self.parts, T // self.size, self.size // self.parts, *x.shape[2:])
        return jnp.moveaxis(chunks, 2, 0).reshape(-1, R, self.size, *x.shape[2:])

    def join(self, x: Array) -> Array:
        """The inverse of `split`."""
        C, R, size = x.shape[:3]
        chunks = x.reshape(C, R, self.parts, size // self.parts, *x.shape[3:])
        return jnp.moveaxis(chunks, 0, 2).reshape(R, C * size, *x.shape[3:])

    def gather(self, hidden: Array) -> Array:
        """Returns a chunk's hidden states `[R, size, D]` whole along the row, of their parts; chosen ones are whole."""
        if self.dim != "time":
            return hidden
        parts = self.constrain(hidden, ("rows", "residual_time", "act_embed"))
        return self.constrain(parts, ("rows", "time", "act_embed"))

    def scatter(self, grad: Array) -> Array:
        """Returns a chunk's gradient `[R, size, D]` as its hidden states came."""
        return self.constrain(grad, ("rows", "residual_time", "act_embed")) if self.dim == "time" else grad

    def take(self, inputs: Sequence[Array], targets: Array) -> tuple["Chunks", list[Array]]:
        """Returns hidden states `[R, T, D]`, and what is known of the next tokens, at the places before `targets`
        `[R, P]`; and their chunks.
        """
        chosen = [_take(x, targets - 1) for x in (self.gather(inputs[0]), *inputs[1:])]
        return replace(self, dim="targets"), chosen

    def over_tokens(self, fn: Callable[[Array], Array], x: Array) -> Array:
        """Returns fn(x), which treats tokens alike, merged where the platform wants it and no part is split off."""
        return self.products.over_tokens(fn, x, "residual_time")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which log-probabilities: under which draw, with the sets `[R, T, W]` that it kept in the form of `draw.kept`.

    `targets` `[R, P]` are the row indices of the tokens that are wanted, none of them a segment's first, and T in empty
    places; None wants all. A chunk's size divides P then. `num_choices`, or `compare_fn` with the `teacher`'s ids and
    log-probabilities `[R, T, K + 1]`, are as in `core.loss.Readout`.
    """

    draw: Draw = Draw()
    kept: Array | None = None
    needs_entropy: bool = False
    targets: Array | None = None
    num_choices: int | None = None
    compare_fn: CompareFn | None = None
    teacher: tuple[Array, Array] | None = None

    @property
    def of_tokens(self) -> tuple[Array, ...]:
        """What is known of each token beside itself: the set that it was drawn from, and what a teacher says of it."""
        return (*(() if self.kept is None else (self.kept,)), *(self.teacher or ()))


def chunk_len(
    row_len: int, rows_per_device: int, vocab_per_device: int, max_bytes: int = CHUNK_BYTES, parts: int = 1
) -> int:
    """Returns the largest divisor of the row length whose chunk of logits stays under `max_bytes`, or the least.

    It is a multiple of `parts`, which divides the row length.
    """
    limit = max_bytes // (4 * rows_per_device * vocab_per_device) // parts
    of_part = row_len // parts
    return parts * next(n for n in range(min(max(limit, 1), of_part), 0, -1) if of_part % n == 0)


def _next(x_RT: Array) -> Array:
    """Moves entries about a token to the position before it, 0 at the last; trailing dims come along."""
    return jnp.pad(x_RT, ((0, 0), (0, 1)) + ((0, 0),) * (x_RT.ndim - 2))[:, 1:]


def _take(x_RT: Array, index_RP: Array) -> Array:
    """Returns the entries of each row at its indices, `[R, P, ...]`; trailing dims come along."""
    return jax.vmap(lambda row, index: jnp.take(row, index, axis=0, mode="clip"))(x_RT, index_RP)


def _put(x_RP: Array, index_RP: Array, row_len: int) -> Array:
    """Returns rows `[R, row_len, ...]` with the entries at their indices, 0 elsewhere; those beyond a row are dropped.

    Trailing dims come along.
    """
    put = lambda row, index: jnp.zeros((row_len, *row.shape[1:]), row.dtype).at[index].set(row, mode="drop")
    return jax.vmap(put)(x_RP, index_RP)


def cap_logits(logits: Array, softcap: float | None) -> Array:
    """Returns the logits between plus and minus `softcap`, c * tanh(logits / c), or as they are (arXiv:2408.00118)."""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _chunk_logits(hidden: Array, kernel: Array, chunks: Chunks) -> Array:
    logits = chunks.over_tokens(lambda x: chunks.products.matmul(x, kernel, 1, jnp.float32), hidden)
    return cap_logits(chunks.constrain(logits, ("rows", chunks.dim, "act_vocab")), chunks.softcap)


def _drawn_logits(logits: Array, draw: Draw, kept: Array | None, chunks: Chunks) -> Array:
    """Returns the logits of a draw: over its temperature, and `REMOVED` for tokens that it left out."""
    logits, num_rows = logits / draw.temperature, logits.shape[-1]
    if draw.num_tokens is not None and draw.num_tokens < num_rows:
        is_token = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) < draw.num_tokens
        logits = jnp.where(is_token, logits, REMOVED)
    if draw.kept is None or kept is None:
        return logits
    sets_of_all = jnp.pad(draw.kept.unpack(kept), ((0, 0), (0, 0), (0, num_rows - draw.kept.vocab_size)))
    return jnp.where(chunks.constrain(sets_of_all, ("rows", chunks.dim, "act_vocab")), logits, REMOVED)


def _target_logprobs(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Returns the log-probabilities of the targets and the log normaliser, `[R, T]` each, and works on split
    vocabularies.
    """
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == targets[..., None]
    return jnp.sum(jnp.where(is_target, logits, 0), axis=-1) - normaliser, normaliser


def token_logprobs(
    hidden: Array,
    kernel: Array,
    tokens: Array,
    segment_ids: Array,
    chunks: Chunks,
    wanted: Wanted = Wanted(),  # noqa: B008 - frozen
) -> dict[str, Array]:
    """Returns the outputs of head `logprobs`, or with `num_choices` of head `choices`, see `core.loss.Readout`.

    `hidden` `[R, T, D]`, `kernel` `[D, V]`; tokens that are not wanted get 0. Where there are several chunks, the
    backward pass computes a chunk's logits anew.
    """
    draw, targets = wanted.draw, wanted.targets
    assert (draw.kept is None) == (wanted.kept is None), "a draw that leaves tokens out needs the sets that it left"
    inputs = [hidden, *map(_next, (tokens, *wanted.of_tokens))]
    if targets is not None:
        chunks, inputs = chunks.take(inputs, targets)

    sink = kernel.astype(jnp.float32)

    def chunk(hidden_chunk: Array, targets: Array, *given: Array) -> dict[str, Array]:
        kept, teacher = (None, given) if draw.kept is None else (given[0], given[1:])
        logits = _chunk_logits(chunks.gather(hidden_chunk), collect(kernel, sink), chunks)
        logits = _drawn_logits(logits, draw, kept, chunks)
        if wanted.num_choices is not None:
            return _choose(logits, wanted.num_choices, chunks)
        return _describe(logits, targets, teacher, wanted, chunks)

    chunk_fn = chunk if chunks.size == inputs[0].shape[1] else jax.checkpoint(chunk)
    outputs = jax.lax.map(lambda xs: chunk_fn(*xs), tuple(map(chunks.split, inputs)))
    if targets is not None:
        row_len = tokens.shape[1]
        return {name: _put(chunks.join(output), targets, row_len) for name, output in outputs.items()}
    return {name: move_to_next(chunks.join(output), segment_ids) for name, output in outputs.items()}


def _describe(
    logits: Array, targets: Array, teacher: Sequence[Array], wanted: Wanted, chunks: Chunks
) -> dict[str, Array]:
    """Returns what is wanted of a chunk of the head `logprobs`, `[R, T]` each."""
    logprobs, normaliser = _target_logprobs(logits, targets)
    outputs = {"logprobs": logprobs}
    if not wanted.needs_entropy and wanted.compare_fn is None:
        return outputs
    all_logprobs = logits - normaliser[..., None]
    if wanted.needs_entropy:
        probs = jnp.exp(all_logprobs)
        # A removed token has no place in the sum even with its factor of 0: times a gradient it overflows.
        outputs["entropy"] = -jnp.sum(probs * jnp.where(probs > 0, all_logprobs, 0), axis=-1)
    if wanted.compare_fn is not None:
        ids, of_teacher = teacher
        outputs["divergence"] = _compare(all_logprobs, ids, of_teacher, wanted.compare_fn, chunks)
    return outputs


def _choose(logits: Array, num_choices: int, chunks: Chunks) -> dict[str, Array]:
    """Returns the outputs of head `choices` for a chunk of logits `[R, T, V]`, V at least `num_choices`."""
    R, T, V = logits.shape
    # Of each part of the vocabulary first, so that no device needs the logits of another.
    num_parts, size = chunks.vocab_parts, V // chunks.vocab_parts
    dims = ("rows", chunks.dim, "act_vocab", "choices")
    values, ids = _largest(chunks.constrain(logits.reshape(R, T, num_parts, size), dims), min(num_choices, size))
    ids += size * jnp.arange(num_parts, dtype=ids.dtype)[:, None]
    whole = lambda x: chunks.constrain(x.reshape(R, T, -1), ("rows", chunks.dim, "choices"))
    values, places = _largest(whole(values), num_choices)
    ids = jnp.take_along_axis(whole(ids), places, axis=-1)
    last = values[..., -1:]
    num_ties = jnp.sum(logits == last, axis=-1) - jnp.sum(values == last, axis=-1)  # left out, as likely as the last
    of_ties = jnp.where(num_ties > 0, last[..., 0] + jnp.log(jnp.maximum(num_ties, 1)), REMOVED)
    rest = jnp.logaddexp(jax.nn.logsumexp(jnp.where(logits < last, logits, REMOVED), axis=-1), of_ties)
    normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    others = jnp.full((R, T, 1), OTHERS, jnp.int32)
    return {
        "ids": jnp.concatenate([ids.astype(jnp.int32), others], axis=-1),
        "choices": jnp.concatenate([values, rest[..., None]], axis=-1) - normaliser,
    }


def _largest(x: Array, k: int) -> tuple[Array, Array]:
    """Returns the k largest `[R, T, ..., k]` along the last dim, and where they are."""
    find = partial(largest, k=k)
    for _ in x.shape[:-2]:
        find = jax.vmap(find)
    return find(x)


def _compare(logprobs: Array, ids: Array, of_teacher: Array, compare_fn: CompareFn, chunks: Chunks) -> Array:
    """Returns the divergence `[R, T]` of distributions `[R, T, V]` from a teacher's choices `[R, T, K + 1]`.

    Its outcomes are the teacher's K tokens, and all others as one.
    """
    # Spread over the vocabulary, they meet the student's where these are; and what has a gradient is not gathered.
    spread = lambda ids, values: jnp.full(logprobs.shape[-1], REMOVED).at[ids].set(values, mode="drop")
    of_all = chunks.constrain(jax.vmap(jax.vmap(spread))(ids, of_teacher), ("rows", chunks.dim, "act_vocab"))
    is_choice = of_all > REMOVED
    select = lambda x: jnp.where(is_choice, x, 0)
    terms = select(compare_fn(select(of_all), select(logprobs)))
    rest = jax.nn.logsumexp(jnp.where(is_choice, REMOVED, logprobs), axis=-1)
    return jnp.sum(terms, axis=-1) + compare_fn(of_teacher[..., -1], rest)


def weighted_nll(
    hidden: Array,
    kernel: Array,
    tokens: Array,
    segment_ids: Array,
    weights: Array,
    chunks: Chunks,
    targets: Array | None = None,
) -> tuple[Array, Array]:
    """Returns -sum(weights * logprobs), a float32 scalar, and the log-probabilities `[R, T]` (no gradient through
    these). With `targets`, as in `Wanted`, it is of those tokens alone.

    The gradient of a sum whose weights are known beforehand is formed while a chunk's logits are at hand, so the head's
    product is not computed a second time in the backward pass.
    """
    inputs = [hidden, _next(tokens), move_to_previous(weights.astype(jnp.float32), segment_ids)]
    if targets is not None:
        chunks, inputs = chunks.take(inputs, targets)
    hidden, ids, weights_next = inputs
    nll, logprobs = cast(tuple[Array, Array], _fused_nll(hidden, kernel, ids, weights_next, chunks))
    logprobs = jax.lax.stop_gradient(logprobs)
    return nll, move_to_next(logprobs, segment_ids) if targets is None else _put(logprobs, targets, tokens.shape[1])


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _fused_nll(hidden: Array, kernel: Array, targets: Array, weights: Array, chunks: Chunks) -> tuple[Array, Array]:
    def chunk(hidden_chunk: Array, targets_chunk: Array) -> Array:
        return _target_logprobs(_chunk_logits(chunks.gather(hidden_chunk), kernel, chunks), targets_chunk)[0]

    logprobs = chunks.join(jax.lax.map(lambda xs: chunk(*xs), (chunks.split(hidden), chunks.split(targets))))
    return -jnp.sum(weights * logprobs), logprobs


def _fused_nll_forward(hidden: Array, kernel: Array, targets: Array, weights: Array, chunks: Chunks):
    def chunk(grad_kernel: Array, xs: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        hidden_chunk, targets_chunk, weights_chunk = xs
        hidden_chunk = chunks.gather(hidden_chunk)
        logits = _chunk_logits(hidden_chunk, kernel, chunks)
        logprobs, normaliser = _target_logprobs(logits, targets_chunk)
        is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == targets_chunk[..., None]
        grad_logits = (jnp.exp(logits - normaliser[..., None]) - is_target) * weights_chunk[..., None]
        if chunks.softcap is not None:
            grad_logits *= 1 - jnp.square(logits / chunks.softcap)
        grad_logits = grad_logits.astype(hidden.dtype)
        grad_hidden = chunks.over_tokens(lambda grad: grad @ kernel.T, grad_logits)
        grad_hidden = chunks.scatter(grad_hidden)
        flat_hidden, flat_grad = (x.reshape(-1, x.shape[-1]) for x in (hidden_chunk, grad_logits))
        grad_kernel += jnp.matmul(flat_hidden.T, flat_grad, preferred_element_type=jnp.float32)
        return grad_kernel, (logprobs, grad_hidden)

    parts = chunks.split(hidden), chunks.split(targets), chunks.split(weights)
    grad_kernel, (logprobs, grad_hidden) = jax.lax.scan(chunk, jnp.zeros(kernel.shape, jnp.float32), parts)
    logprobs = chunks.join(logprobs)
    return (-jnp.sum(weights * logprobs), logprobs), (chunks.join(grad_hidden), grad_kernel.astype(kernel.dtype))


def _fused_nll_backward(chunks: Chunks, residuals: tuple[Array, Array], cotangents: tuple[Array, Array]):
    grad_hidden, grad_kernel = residuals
    scale = cotangents[0]
    return (grad_hidden * scale.astype(grad_hidden.dtype), grad_kernel * scale.astype(grad_kernel.dtype), None, None)


_fused_nll.defvjp(_fused_nll_forward, _fused_nll_backward)


def token_values(hidden: Array, kernel: Array, matmul: MatmulFn = matmul) -> Array:
    """Returns the scalar head's float32 outputs `[R, T]`; entry t has seen tokens up to and including t."""
    return matmul(hidden, kernel, 1, jnp.float32)[..., 0]
