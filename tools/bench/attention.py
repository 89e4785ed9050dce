"""Every attention kernel that can serve the devices at hand: compared with the definition, then timed on packed rows.

    python -m tools.bench.attention                                    # a few seconds on CPUs
    python -m tools.bench.attention --dtype bfloat16 --row-len 4096 --heads 32 8 --head-dim 128      # on a GPU

A kernel of others' that disagrees on small packed rows is not timed. Of the others it prints milliseconds of a forward
pass and of a forward and backward pass, medians of alternating rounds, and of the latter the processor's milliseconds,
which on CPUs say more where others work too; operations a second, by the scores that tokens
of one segment have of each other (4 H a score and head forward, 14 H with the backward pass); and how far values and
gradients are from those of the first kernel, as a share of their size.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from realjax.engine.attention.cases import Case, find_capability
from realjax.engine.attention.choose import KERNELS, choose, make_attention
from realjax.engine.attention.compare import find_disagreement
from realjax.models.attention import Scoring


def main() -> None:
    args = parse_args()
    device = jax.devices()[0]
    num_q, num_kv = args.heads
    case = Case(
        use="rows",
        platform=device.platform,
        dtype=args.dtype,
        head_dim=args.head_dim,
        num_q_heads=num_q,
        num_kv_heads=num_kv,
        window=args.window,
        softcap=args.softcap,
        sinks=args.sinks,
        capability=find_capability(device),
    )
    inputs = draw_inputs(args)
    lengths = count_lengths(inputs[-1])
    print(f"{device}, {case}")
    print(f"{args.rows} rows of {args.row_len}, {len(lengths)} segments of {lengths.min()} to {lengths.max()} tokens")
    timed = {}
    for name, kernel in KERNELS.items():
        fault = kernel.find_fault(case) or find_disagreement(kernel.rows, case)
        print(f"{name}: {fault or 'agrees with the definition'}")
        if not fault and name not in args.without:
            timed[name] = make_programs(name, case, args)
    report(timed, inputs, args)
    print(f"auto: {choose('auto', case).kernel}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--row-len", type=int, default=512)
    parser.add_argument("--lengths", type=int, nargs=2, default=(20, 500), help="shortest and longest segment")
    parser.add_argument("--heads", type=int, nargs=2, default=(4, 2), help="query and key-value heads")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--window", type=int)
    parser.add_argument("--softcap", type=float, help="cap of scores")
    parser.add_argument("--sinks", action="store_true", help="a learned logit a head in each softmax")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--without", nargs="*", default=[], choices=list(KERNELS), help="kernels not to time")
    return parser.parse_args()


def draw_inputs(args: argparse.Namespace) -> tuple[np.ndarray, ...]:
    """Returns q, k, v, weights of the sum that is differentiated, and segment ids of full rows."""
    rng = np.random.default_rng(0)
    num_q, num_kv = args.heads
    draw = lambda heads: rng.standard_normal((args.rows, args.row_len, heads, args.head_dim)).astype(args.dtype)
    segment_ids = np.zeros((args.rows, args.row_len), np.int32)
    for row in segment_ids:
        lengths = rng.integers(args.lengths[0], args.lengths[1] + 1, args.row_len)
        row[:] = np.repeat(np.arange(len(lengths)), lengths)[: args.row_len] + 1
    return draw(num_q), draw(num_kv), draw(num_kv), draw(num_q), segment_ids


def count_lengths(segment_ids: np.ndarray) -> np.ndarray:
    """Returns the tokens of each segment."""
    return np.concatenate([np.bincount(row)[1:] for row in segment_ids])


def make_programs(name: str, case: Case, args: argparse.Namespace):
    """Returns the jitted forward pass, and values with gradients."""
    attention_fn = make_attention(name, case, max_segment_len=args.lengths[1])
    sinks = jnp.zeros(args.heads[0], jnp.float32) if args.sinks else None

    def forward(q: Array, k: Array, v: Array, weights: Array, segment_ids: Array) -> Array:
        return attention_fn(q, k, v, segment_ids, Scoring(window=args.window, softcap=args.softcap), sinks)

    def both(q: Array, k: Array, v: Array, weights: Array, segment_ids: Array) -> tuple[Array, ...]:
        attended, backward = jax.vjp(lambda q, k, v: forward(q, k, v, weights, segment_ids), q, k, v)
        return attended, *backward(weights)

    return jax.jit(forward), jax.jit(both)


def report(timed, inputs: tuple[np.ndarray, ...], args: argparse.Namespace) -> None:
    placed = jax.device_put(tuple(map(jnp.asarray, inputs)))
    results = {name: [np.asarray(x, np.float32) for x in both(*placed)] for name, (_, both) in timed.items()}
    seconds: dict[tuple[str, int], list[float]] = {(name, i): [] for name in timed for i in range(2)}
    of_processor: dict[tuple[str, int], list[float]] = {key: [] for key in seconds}
    for turn in range(args.rounds + 1):
        for (name, i), found in seconds.items():
            start, start_of_processor = time.perf_counter(), time.process_time()
            jax.block_until_ready(timed[name][i](*placed))
            if turn:  # the first compiles
                found.append(time.perf_counter() - start)
                of_processor[name, i].append(time.process_time() - start_of_processor)
    lengths = count_lengths(inputs[-1])
    scores = args.heads[0] * args.head_dim * float((lengths * (lengths + 1) / 2).sum())
    first = next(iter(results.values()))
    print(f"{'kernel':10} {'forward ms':>11} {'both ms':>9} {'processor':>9} {'TFLOP/s':>8} {'TFLOP/s':>8}  differ by")
    for name, result in results.items():
        one, two = (statistics.median(seconds[name, i]) for i in range(2))
        processor = 1e3 * statistics.median(of_processor[name, 1])
        apart = max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(result, first, strict=True))
        rates = f"{4 * scores / one / 1e12:8.3g} {14 * scores / two / 1e12:8.3g}"
        print(f"{name:10} {one * 1e3:11.3f} {two * 1e3:9.3f} {processor:9.1f} {rates}  {apart:.2g}")


if __name__ == "__main__":
    main()
