"""One process of several: moves trees between layouts that span processes, or belong to others, and checks its shards.

Run by test_processes.py as `process_worker.py <port> <num_processes> <process_id>`. With `all-pairs <dtype>` behind, it
takes every pair of layouts, which is minutes of compiling.
"""

from itertools import combinations

import jax
import numpy as np

from realjax.core.trees import flatten_paths, map_paths
from realjax.reshard.apply import ema_update, on_host, reshard
from tests.given.processes import work
from tests.reshard.cases import DTYPES, LAYOUTS, check_equal, make_host_tree, make_shardings, place

# Grows, shrinks, permutes, jumps between processes, and leaves some without a shard.
WALK = ("mixed", "first-half", "second-half", "tensor8-permuted", "host-half", "single", "zero3", "experts-zero3")
# For more processes than two, which the halves then span.
SHORT_WALK = ("first-half", "tensor8-permuted", "single", "experts-zero3")


def walk(variant: str, dtype: str, names: tuple[str, ...], **options) -> None:
    """Follows the layouts, back and forth over every step."""
    host = make_host_tree(variant, DTYPES[dtype])
    shardings = {name: make_shardings(variant, name) for name in names}
    tree = place(host, shardings[names[0]])
    for here, there in zip(names, names[1:]):
        moved, _ = reshard(tree, shardings[there], **options)
        check_equal(moved, host, shardings[there])
        back, _ = reshard(moved, shardings[here], **options)
        check_equal(back, host, shardings[here])
        tree, _ = reshard(back, shardings[there], **options)


def cast_and_average() -> None:
    """Casts on the way to the other processes, and averages into a copy that they hold in host memory."""
    start = make_shardings("gqa", "first-half")
    rng = np.random.default_rng(1)
    host = map_paths(
        lambda _, a: np.asarray(rng.normal(size=a.shape), np.float32), make_host_tree("gqa", DTYPES["float32"])
    )
    there = make_shardings("gqa", "second-half")
    half = DTYPES["bfloat16"]
    moved, _ = reshard(place(host, start), there, dtype=half)
    check_equal(moved, map_paths(lambda _, a: a.astype(half), host), there)
    for destination in (there, on_host(there)):
        old = place(map_paths(lambda _, a: np.ones_like(a), host), destination)
        new = ema_update(old, place(host, start), 0.25)
        for path, leaf in flatten_paths(new).items():
            wanted = 0.25 * flatten_paths(host)[path] + np.float32(0.75)
            for shard in leaf.addressable_shards:
                np.testing.assert_allclose(np.asarray(shard.data), wanted[shard.index], rtol=1e-6)


def main(mode: str = "walks", dtype: str = "bfloat16") -> None:
    if mode == "all-pairs":
        for here, there in combinations(LAYOUTS, 2):
            walk("everything", dtype, (here, there))
    else:
        is_short = jax.process_count() > 2
        walk("everything", "bfloat16", SHORT_WALK if is_short else WALK)
        walk("tied", "float32", ("second-half", "mixed"), chunk_bytes=512)
        if not is_short:
            walk("tied", "float32", ("mixed", "middle", "single"), free_source=True)
            cast_and_average()
    print("all equal", flush=True)


if __name__ == "__main__":
    work(main, num_devices=8)
