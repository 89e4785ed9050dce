"""cuDNN's packed attention as it is documented, in numpy, in the place of the calls that only a GPU can run.

A call of b sequences has flat memory for each of q, k, v and what it writes; sequence i is `lengths[i]` tokens from
number `offsets[i]` on (https://docs.nvidia.com/deeplearning/cudnn/frontend/latest/operations/Attention.html: "ragged
offset"). All else is left as it was, here as NaN, so that whoever reads it is found out.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import mlir

from realjax.engine.attention import cudnn


def emulate_cudnn() -> None:
    """Makes JAX's calls of cuDNN run on CPUs, in this process."""
    calls = cudnn.load_calls()
    for primitive, run in (
        (calls._dot_product_attention_fwd_p, _forward),
        (calls._dot_product_attention_bwd_p, _backward),
    ):
        mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=True), platform="cpu")


def _forward(q, k, v, bias, q_lengths, k_lengths, q_offsets, k_offsets, *pages, is_training, **options):
    _check(q, bias, pages, options, q_offsets)
    num_sequences, (_, seq_len, num_heads, _) = q_lengths.size, q.shape
    results = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    results += [jax.ShapeDtypeStruct((num_sequences, num_heads, seq_len), jnp.float32)] * is_training

    def run(q, k, v, *lists):
        out = np.full(q.shape, np.nan, np.float64)
        log_totals = np.full((num_sequences, num_heads, seq_len), np.nan, np.float32)
        for i, sequence in enumerate(_list(q, k, *lists)):
            _, probs, log_total = _scores(sequence, q, k, options)
            values = sequence.of_keys(v)
            sequence.of_queries(out)[:] = np.einsum("nts,snh->tnh", probs, np.repeat(values, sequence.group, 1))
            log_totals[i, :, : sequence.length] = log_total
        return [out.astype(q.dtype), log_totals][: len(results)]

    return _call_host(run, results, q, k, v, q_lengths, k_lengths, q_offsets, k_offsets)


def _backward(q, k, v, bias, q_lengths, k_lengths, q_offsets, k_offsets, *rest, **options):
    *pages, log_totals, out, grad = rest
    _check(q, bias, pages, options, q_offsets)

    def run(q, k, v, log_totals, out, grad, *lists):
        grads = [np.full(x.shape, np.nan, np.float64) for x in (q, k, v)]
        for i, sequence in enumerate(_list(q, k, *lists)):
            scores, _, _ = _scores(sequence, q, k, options)
            probs = np.exp(scores - log_totals[i, :, : sequence.length, None])
            one_grad, one_out = sequence.of_queries(grad).astype(np.float64), sequence.of_queries(out)
            queries, keys, values = sequence.of_queries(q), sequence.of_keys(k), sequence.of_keys(v)
            keys, values = (np.repeat(x, sequence.group, 1).astype(np.float64) for x in (keys, values))
            of_probs = np.einsum("tnh,snh->nts", one_grad, values)
            mean = np.einsum("tnh,tnh->nt", one_grad, one_out.astype(np.float64))[..., None]
            of_scores = probs * (of_probs - mean) * options["scale"]
            per_key = lambda x, g=sequence.group: x.reshape(x.shape[0], -1, g, x.shape[2]).sum(2)
            sequence.of_queries(grads[0])[:] = np.einsum("nts,snh->tnh", of_scores, keys)
            sequence.of_keys(grads[1])[:] = per_key(np.einsum("nts,tnh->snh", of_scores, queries.astype(np.float64)))
            sequence.of_keys(grads[2])[:] = per_key(np.einsum("nts,tnh->snh", probs, one_grad))
        return [x.astype(q.dtype) for x in grads]

    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
    return _call_host(run, results, q, k, v, log_totals, out, grad, q_lengths, k_lengths, q_offsets, k_offsets)


def _call_host(run, results, *args):
    return jax.pure_callback(lambda *args: run(*map(np.asarray, args)), results, *args)


def _check(q, bias, pages, options, offsets):
    """The other forms of the call, which would be another function."""
    assert options["mask_type"].name == "PADDING_CAUSAL" and options["layout"] == 0
    assert bias.size == 0 and all(page.size == 0 for page in pages)
    assert options["dropout_rate"] == 0 and options["variadic_args"] == (False, False)
    assert offsets.shape[1] > 2, "with one sequence a part, JAX hands no offsets on"


class _Sequence:
    def __init__(self, q, k, length, q_offset, k_offset):
        self.length, self.group = int(length), q.shape[2] // k.shape[2]
        self.starts = {"q": int(q_offset), "k": int(k_offset)}
        assert 0 < self.length <= q.shape[1], "a sequence is longer than the call has room for"

    def of_queries(self, x):
        return self._view(x, self.starts["q"])

    def of_keys(self, x):
        return self._view(x, self.starts["k"])

    def _view(self, x, start):
        heads, size = x.shape[-2:]
        flat = x.reshape(-1)[start : start + self.length * heads * size]
        return flat.reshape(self.length, heads, size)


def _list(q, k, q_lengths, k_lengths, q_offsets, k_offsets):
    assert np.array_equal(q_lengths, k_lengths)
    offsets = [x.reshape(-1)[: q_lengths.size + 1] for x in (q_offsets, k_offsets)]
    assert all((x[:-1] <= x[1:]).all() for x in offsets) and offsets[0][-1] <= q.size and offsets[1][-1] <= k.size
    lengths = q_lengths.reshape(-1)
    used = int((lengths > 0).sum())
    assert (lengths[:used] > 0).all(), "sequences without tokens come last"
    return [_Sequence(q, k, lengths[i], offsets[0][i], offsets[1][i]) for i in range(used)]


def _scores(sequence, q, k, options):
    queries = sequence.of_queries(q).astype(np.float64)
    keys = np.repeat(sequence.of_keys(k).astype(np.float64), sequence.group, 1)
    scores = np.einsum("tnh,snh->nts", queries, keys) * options["scale"]
    behind = np.arange(sequence.length)[:, None] - np.arange(sequence.length)[None]
    window = options["sliding_window_length"] or sequence.length
    scores = np.where((behind >= 0) & (behind < window), scores, -np.inf)
    largest = scores.max(-1)
    log_total = largest + np.log(np.exp(scores - largest[..., None]).sum(-1))
    return scores, np.exp(scores - log_total[..., None]), log_total
