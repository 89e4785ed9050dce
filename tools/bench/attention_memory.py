"""What each attention kernel takes of an H100 that is not here: memory and products of a layer, by compiling it.

    python -m tools.bench.attention_memory          # needs the extra `aot`; a minute

A line for each kernel: attention with its gradients on packed rows in bfloat16, MiB of temporaries and 10^9
multiplications and additions on a device. What cuDNN multiplies and its scratch the compiler does not say.
"""

import argparse

import jax
import jax.numpy as jnp
from jax import Array

from realjax.aot import hlo
from realjax.aot.targets import find_target
from realjax.core.layout import Layout, ParallelStrategy
from realjax.engine.attention.cases import Case
from realjax.engine.attention.choose import KERNELS, make_attention
from realjax.models.attention import Scoring

# Rows, their length, query heads, key-value heads, devices, and the longest segment.
SHAPES = (
    (1, 4096, 32, 32, 2, 4096),
    (4, 4096, 32, 32, 2, 4096),
    (4, 4096, 32, 32, 2, 1024),
    (1, 32768, 32, 8, 1, 32768),
)


def main() -> None:
    jax.config.update("jax_platforms", "cpu")  # nothing runs on a GPU, here or not
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="*", default=["cudnn", "blocked"], choices=list(KERNELS))
    parser.add_argument("--head-dim", type=int, default=128)
    args = parser.parse_args()
    print(f"{'rows':>10} {'longest':>8} {'heads':>7} {'devices':>8} {'kernel':8} {'MiB':>9} {'10^9':>8}")
    for shape in SHAPES:
        R, T, N, K, tp, longest = shape
        for kernel in args.kernels:
            temporaries, flops = compile_layer(kernel, shape, args.head_dim)
            name, heads = f"{R} x {T}", f"{N}, {K}"
            print(f"{name:>10} {longest:8} {heads:>7} {tp:8} {kernel:8} {temporaries:9.1f} {flops:8.1f}", flush=True)


def compile_layer(kernel: str, shape: tuple[int, ...], head_dim: int) -> tuple[float, float]:
    """Returns MiB of temporaries, and 10^9 operations of products that the compiler sees."""
    R, T, N, K, tp, longest = shape
    target = find_target("h100")
    layout = Layout.of(ParallelStrategy(tp=tp), target.devices(1, tp))
    case = Case(
        use="rows",
        platform="gpu",
        dtype="bfloat16",
        head_dim=head_dim,
        num_q_heads=N,
        num_kv_heads=K,
        capability=(9, 0),
    )
    attention_fn = make_attention(kernel, case, layout, longest)

    def summed(q: Array, k: Array, v: Array, weights: Array, segment_ids: Array) -> Array:
        return jnp.sum(attention_fn(q, k, v, segment_ids, Scoring(), None).astype(jnp.float32) * weights)

    def heads(num_heads: int, dtype: str) -> jax.ShapeDtypeStruct:
        by_heads = layout.sharding(None, None, "tensor")
        return jax.ShapeDtypeStruct((R, T, num_heads, head_dim), dtype, sharding=by_heads)

    inputs = (heads(N, "bfloat16"), heads(K, "bfloat16"), heads(K, "bfloat16"), heads(N, "float32"))
    segment_ids = jax.ShapeDtypeStruct((R, T), jnp.int32, sharding=layout.replicated)
    program = target.compile(jax.jit(jax.grad(summed, argnums=(0, 1, 2))).lower(*inputs, segment_ids))
    memory = program.memory_analysis()
    assert memory is not None, "a backend says what its programs take"
    return memory.temp_size_in_bytes / 2**20, hlo.read(program.as_text() or "").matmul_flops / 1e9


if __name__ == "__main__":
    main()
