"""Layouts and small trees that the tests move between, for eight devices in any number of processes."""

import jax
import ml_dtypes
import numpy as np

from realjax.core.axes import train_rules, tree_shardings
from realjax.core.layout import Layout, ParallelStrategy
from realjax.core.trees import Tree, flatten_paths, map_paths
from realjax.reshard.apply import on_host

# name: (dp, pp, tp, zero stage, positions in the device list, on the host)
LAYOUTS = {
    "data8": (8, 1, 1, 0, (0, 1, 2, 3, 4, 5, 6, 7), False),
    "tensor8": (1, 1, 8, 0, (0, 1, 2, 3, 4, 5, 6, 7), False),
    "pipe8": (1, 8, 1, 0, (0, 1, 2, 3, 4, 5, 6, 7), False),
    "mixed": (2, 2, 2, 0, (0, 1, 2, 3, 4, 5, 6, 7), False),
    "mixed-permuted": (2, 2, 2, 0, (5, 2, 7, 0, 3, 6, 1, 4), False),
    "zero3": (4, 1, 2, 3, (0, 1, 2, 3, 4, 5, 6, 7), False),
    "zero3-pipe": (2, 4, 1, 3, (0, 1, 2, 3, 4, 5, 6, 7), False),
    "tensor8-permuted": (1, 1, 8, 0, (7, 3, 1, 5, 0, 2, 4, 6), False),
    "first-half": (1, 1, 4, 0, (0, 1, 2, 3), False),
    "second-half": (1, 2, 2, 0, (4, 5, 6, 7), False),
    "middle": (4, 1, 1, 3, (2, 3, 4, 5), False),
    "quarter": (1, 1, 2, 0, (5, 2), False),
    "single": (1, 1, 1, 0, (6,), False),
    "experts": (4, 1, 2, 0, (0, 1, 2, 3, 4, 5, 6, 7), False),
    "experts-zero3": (4, 2, 1, 3, (7, 3, 1, 5, 0, 2, 4, 6), False),
    "host": (2, 1, 4, 0, (0, 1, 2, 3, 4, 5, 6, 7), True),
    "host-half": (1, 2, 2, 0, (6, 1, 0, 7), True),
}

# Devices that share experts, where they do.
EXPERT_SIZES = {"experts": 4, "experts-zero3": 2}

# leaf: (names of the dims, sizes). Two KV heads lie whole on every device where tp is 4 or 8.
DENSE = {
    "embed/kernel": (("vocab", "embed"), (32, 16)),
    "layers/q": (("layers", "embed", "q_heads", "head_dim"), (8, 16, 8, 2)),
    "layers/mlp": (("layers", "ffn", "embed"), (8, 24, 16)),
    "layers/norm": (("layers", "norm"), (8, 16)),
    "norm": (("norm",), (16,)),
    "scale": ((), ()),
}
VARIANTS = {
    "tied": DENSE,
    "untied": {**DENSE, "head": (("embed", "vocab"), (16, 32))},
    "gqa": {**DENSE, "layers/k": (("layers", "embed", "kv_heads", "head_dim"), (8, 16, 2, 4))},
    "moe": {**DENSE, "layers/experts": (("layers", "experts", "expert_embed", "ffn"), (8, 4, 16, 8))},
}
VARIANTS["everything"] = {**VARIANTS["untied"], **VARIANTS["gqa"], **VARIANTS["moe"]}
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def make_host_tree(variant: str, dtype: np.dtype, seed: int = 0) -> Tree:
    """Returns numpy leaves of random bits, NaNs of every payload, infinities and denormals among them."""
    rng = np.random.default_rng(seed)
    bits = np.dtype(f"uint{8 * dtype.itemsize}")
    sizes = {path: size for path, (_, size) in VARIANTS[variant].items()}
    flat = {p: rng.integers(0, 2 ** (8 * bits.itemsize), s, dtype=bits).view(dtype) for p, s in sizes.items() if s}
    tree: Tree = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return {**tree, "scale": np.array(-0.0, dtype)}


def make_shardings(variant: str, layout_name: str) -> Tree:
    """Returns the shardings of a variant's tree in one of `LAYOUTS`."""
    dp, pp, tp, zero_stage, positions, host = LAYOUTS[layout_name]
    devices = sorted(jax.devices(), key=lambda d: d.id)
    strategy = ParallelStrategy(dp=dp, pp=pp, tp=tp, zero_stage=zero_stage, ep=EXPERT_SIZES.get(layout_name, 1))
    layout, rules = Layout.of(strategy, [devices[i] for i in positions]), train_rules(strategy)
    tree = make_host_tree(variant, DTYPES["float32"])
    names = map_paths(lambda path, _: VARIANTS[variant][path][0], tree)
    shardings = tree_shardings(names, tree, rules, layout)
    return on_host(shardings) if host else shardings


def place(host_tree: Tree, shardings: Tree) -> Tree:
    """Returns the arrays of `host_tree`, each process giving its own shards."""
    return map_paths(
        lambda _, leaf, sharding: jax.make_array_from_callback(
            leaf.shape, sharding, lambda index: leaf[index], dtype=leaf.dtype
        ),
        host_tree,
        shardings,
    )


def check_equal(tree: Tree, host_tree: Tree, shardings: Tree) -> None:
    """Raises AssertionError unless this process's shards lie where `shardings` say and hold the bits of `host_tree`."""
    expected, places = flatten_paths(host_tree), flatten_paths(shardings)
    for path, leaf in flatten_paths(tree).items():
        assert leaf.sharding == places[path], f"{path}: lies in {leaf.sharding}, not in {places[path]}"
        assert leaf.dtype == expected[path].dtype, f"{path}: {leaf.dtype}"
        for shard in leaf.addressable_shards:
            found, wanted = np.asarray(shard.data), expected[path][shard.index]
            assert shard.data.sharding.memory_kind == places[path].memory_kind, f"{path}: wrong kind of memory"
            assert found.tobytes() == wanted.tobytes(), f"{path}: other bits on {shard.device}"
