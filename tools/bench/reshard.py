"""Measures reallocation between pairs of layouts against `jax.device_put` and a jitted identity, in one run.

    python tools/bench/reshard.py --mebibytes 128 --repeats 5

For every pair and method: bytes that must cross devices (the lower bound), seconds of the first call and the median of
the later ones (methods alternate, each on a fresh source), GB/s of those bytes, and the peak of the resident set above
the source, over the destination's bytes. Every figure of memory comes from a process of its own. Runs on CPU devices.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from math import prod
from pathlib import Path

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from realjax.core.axes import train_rules, tree_shardings
from realjax.core.layout import Layout, ParallelStrategy
from realjax.core.trees import Tree
from realjax.reshard.apply import on_host, reshard
from realjax.reshard.movers import MOVERS
from realjax.reshard.plan import ReshardPlan, plan_reshard

ALL = tuple(range(8))
# name: (dp, pp, tp, zero stage, devices, on the host)
LAYOUTS = {
    "m8": (1, 1, 8, 0, ALL, False),
    "p8": (1, 8, 1, 0, ALL, False),
    "m8 permuted": (1, 1, 8, 0, (7, 3, 1, 5, 0, 2, 4, 6), False),
    "d2p2m2": (2, 2, 2, 0, ALL, False),
    "d2m4": (2, 1, 4, 0, ALL, False),
    "d8 zero3": (8, 1, 1, 3, ALL, False),
    "p2m2 on 0-3": (1, 2, 2, 0, (0, 1, 2, 3), False),
    "m4 on 4-7": (1, 1, 4, 0, (4, 5, 6, 7), False),
    "m2 on 2,5": (1, 1, 2, 0, (2, 5), False),
    "m8 host": (1, 1, 8, 0, ALL, True),
}
PAIRS = [
    ("m8", "p8"),
    ("m8", "m8 permuted"),
    ("d8 zero3", "m8"),
    ("d8 zero3", "d2p2m2"),
    ("d2p2m2", "d2m4"),
    ("d2p2m2", "m4 on 4-7"),
    ("m8", "p2m2 on 0-3"),
    ("p2m2 on 0-3", "m4 on 4-7"),
    ("m2 on 2,5", "m8"),
    ("m8", "m8 host"),
    ("m8 host", "p2m2 on 0-3"),
]
NAMES = {
    "embed": ("vocab", "embed"),
    "mlp": ("layers", "ffn", "embed"),
    "q": ("layers", "embed", "q_heads", "head_dim"),
}


def make_shapes(num_mebibytes: int) -> Tree:
    """Returns three abstract float32 leaves of 1/4, 1/2 and 1/4 of the size."""
    unit = num_mebibytes * 2**20 // 4 // 1024
    shapes = {"embed": (unit // 4, 1024), "mlp": (8, unit // 16, 1024), "q": (8, 1024, 32, unit // 1024)}
    return {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}


def make_shardings(name: str, abstract: Tree) -> Tree:
    dp, pp, tp, zero_stage, ids, host = LAYOUTS[name]
    strategy = ParallelStrategy(dp=dp, pp=pp, tp=tp, zero_stage=zero_stage)
    layout = Layout.of(strategy, [jax.devices()[i] for i in ids])
    shardings = tree_shardings(NAMES, abstract, train_rules(strategy), layout)
    return on_host(shardings) if host else shardings


def make_source(abstract: Tree, shardings: Tree) -> Tree:
    def fill(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.Array:
        shard = np.ones(sharding.shard_shape(leaf.shape), leaf.dtype)
        buffers = [jax.device_put(shard.copy(), d) for d in sharding.device_set]
        array = jax.make_array_from_single_device_arrays(leaf.shape, sharding.with_memory_kind("device"), buffers)
        return array if sharding.memory_kind == "device" else jax.device_put(array, sharding)

    return jax.block_until_ready(jax.tree.map(fill, abstract, shardings))


def move_by_exchange(tree: Tree, shardings: Tree) -> Tree:
    """Takes the collective route of accelerators and of several processes, in chunks of 8 MiB a device."""
    plan: ReshardPlan = plan_reshard(tree, jax.tree.map(lambda a: a.sharding, tree), shardings)
    leaves, treedef = jax.tree.flatten(tree)
    pairs = zip(plan.leaves, leaves)
    return jax.tree.unflatten(treedef, [MOVERS["exchange"]([p], [a], False, 8 * 2**20)[0] for p, a in pairs])


def move_by_jit(tree: Tree, shardings: Tree) -> Tree:
    """Takes a jitted identity on the source's devices, the destination's first, and wraps the shards that are wanted.

    Raises ValueError where the source lacks a destination device.
    """
    source = jax.tree.leaves(tree)[0].sharding.mesh
    mesh = jax.tree.leaves(shardings)[0].mesh
    rest = [d for d in source.devices.flat if d not in mesh.devices]
    grid = np.array([*mesh.devices.flat, *rest], dtype=object)
    if len(grid) != source.size:
        raise ValueError("a jitted identity cannot reach devices that the source is not on")
    union = Mesh(
        grid.reshape(-1, *mesh.devices.shape),
        ("_copy", *mesh.axis_names),
        axis_types=(AxisType.Auto,) * (mesh.devices.ndim + 1),
    )
    wide = jax.tree.map(lambda s: NamedSharding(union, s.spec, memory_kind=s.memory_kind), shardings)
    moved = jax.jit(lambda t: t, out_shardings=wide)(tree)

    def wrap(array: jax.Array, sharding: NamedSharding) -> jax.Array:
        shards = [s.data for s in array.addressable_shards if s.device in sharding.device_set]
        return jax.make_array_from_single_device_arrays(array.shape, sharding, shards)

    return jax.tree.map(wrap, moved, shardings)


METHODS: dict[str, Callable[[Tree, Tree], Tree]] = {
    "reshard": lambda tree, shardings: reshard(tree, shardings)[0],
    "exchange": move_by_exchange,
    "device_put": jax.device_put,
    "jit": move_by_jit,
}


def measure_seconds(abstract: Tree, source: Tree, destination: Tree, num_repeats: int) -> dict[str, list[float]]:
    """Returns the seconds of each call by method, or no figure where the method refuses the pair."""
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    failed: set[str] = set()
    for _ in range(num_repeats + 1):
        for name, method in METHODS.items():
            if name in failed:
                continue
            tree = make_source(abstract, source)
            start = time.perf_counter()
            try:
                jax.block_until_ready(method(tree, destination))
                seconds[name].append(time.perf_counter() - start)
            except (ValueError, jax.errors.JaxRuntimeError):
                failed.add(name)
    return seconds


def measure_memory(abstract: Tree, source: Tree, destination: Tree, method: str) -> float:
    """Returns the peak of the resident set while `method` moves the tree, above what the source needs, in bytes."""
    small = make_shapes(4)
    jax.block_until_ready(METHODS[method](make_source(small, source), destination))
    tree = make_source(abstract, source)
    before = read_status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # starts the kernel's high-water mark anew
    jax.block_until_ready(METHODS[method](tree, destination))
    return read_status("VmHWM") - before


def count_bytes(abstract: Tree, shardings: Tree) -> int:
    """Returns the bytes of all shards, replicas counted each."""
    sizes = jax.tree.map(lambda a, s: prod(s.shard_shape(a.shape)) * 4 * s.num_devices, abstract, shardings)
    return sum(jax.tree.leaves(sizes))


def read_status(key: str) -> int:
    """Returns a figure of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def run_child(*arguments: str) -> dict | None:
    """Returns what this file prints when it runs with `arguments` in a process of its own, None where it fails."""
    child = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, timeout=600)
    return json.loads(child.stdout.splitlines()[-1]) if child.returncode == 0 else None


def measure(options: argparse.Namespace) -> dict:
    abstract = make_shapes(options.mebibytes)
    source, destination = (make_shardings(name, abstract) for name in PAIRS[options.pair])
    plan = plan_reshard(abstract, source, destination)
    figures = {"moved": plan.bytes_moved, "destination": count_bytes(abstract, destination)}
    if options.method:
        return figures | {"peak": measure_memory(abstract, source, destination, options.method)}
    return figures | {"seconds": measure_seconds(abstract, source, destination, options.repeats)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=128, help="size of one copy of the tree")
    parser.add_argument("--repeats", type=int, default=5, help="calls after the first one")
    parser.add_argument("--pair", type=int, help="measure one pair in this process, and print JSON")
    parser.add_argument("--method", choices=list(METHODS), help="with --pair: the peak memory of one method")
    options = parser.parse_args()
    if options.pair is not None:
        print(json.dumps(measure(options)))
        return
    print(f"{'from -> to':28}{'must move':>12} {'method':11}{'first s':>9}{'median s':>9}{'GB/s':>7}{'peak/dst':>9}")
    for pair, (here, there) in enumerate(PAIRS):
        base = ["--mebibytes", str(options.mebibytes), "--repeats", str(options.repeats), "--pair", str(pair)]
        timed = run_child(*base)
        if timed is None:
            raise RuntimeError(f"{here} -> {there}: the measuring process failed; run it alone: --pair {pair}")
        for method, seconds in timed["seconds"].items():
            print(f"{here + ' -> ' + there:28}{timed['moved'] / 2**20:8.0f} MiB {method:11}", end="")
            if not seconds:
                print("  does not work here")
                continue
            median, weighed = statistics.median(seconds[1:]), run_child(*base, "--method", method)
            peak = f"{weighed['peak'] / weighed['destination']:9.2f}" if weighed else "        -"
            print(f"{seconds[0]:9.3f}{median:9.3f}{timed['moved'] / 1e9 / median:7.2f}{peak}", flush=True)


if __name__ == "__main__":
    main()
