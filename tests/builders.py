"""Tiny models, parameters, packed batches and layouts that many tests share."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from realjax.core.axes import Rules, optimizer_rules, tree_shardings
from realjax.core.batch import Batch
from realjax.core.layout import Layout, ParallelStrategy
from realjax.core.trees import Tree, flatten_paths, map_paths
from realjax.data.packing import PackPlan, pack
from realjax.engine.attention.choose import KERNELS, Case
from realjax.hf.families import FAMILIES, config_from_hf
from realjax.models.build import Model, build_model
from realjax.models.config import AttentionConfig, LayerKind, MLPConfig, ModelConfig, NormConfig
from tests.hf.tiny import SIZES

FAMILY_CONFIGS = {name: config_from_hf({"model_type": name, **SIZES}, name) for name in FAMILIES}
# Packed rows of tiny models on CPUs, as attention kernels see them.
CASE = Case(use="rows", platform="cpu", dtype="float32", head_dim=4)
# The attention kernels that run on any device.
PORTABLE_KERNELS = tuple(name for name, kernel in KERNELS.items() if kernel.find_fault(CASE) is None)
# Every leaf a family can have: norms and biases everywhere, a head of its own.
FULL = {"qkv_bias": True, "o_bias": True, "bias": True, "qk_norm": NormConfig()}


def make_model(**changes) -> Model:
    """Returns a two-layer model with eight query and two key-value heads.

    `changes` are fields of ModelConfig, or of the mixer and the feed-forward of its one kind of layer.
    """
    sizes = {
        "family": "llama",
        "vocab_size": 96,
        "hidden_size": 32,
        "num_layers": 2,
        "num_q_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 4,
        "ffn_size": 48,
        "max_positions": 128,
    }
    take = lambda kind: {name: changes.pop(name) for name in kind.__dataclass_fields__ if name in changes}
    mixer, feed_forward = AttentionConfig(**take(AttentionConfig)), MLPConfig(**take(MLPConfig))
    kind = LayerKind(mixer=mixer, feed_forward=feed_forward)
    return build_model(ModelConfig(**{**sizes, "pattern": (kind,), **changes}))


def quick_jit(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Returns `jax.jit(fn)` without LLVM's optimisations: half the time to compile, and tiny models run once."""
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0}, **options)


def make_layout(dp: int = 1, tp: int = 1, pp: int = 1, sp: bool = False, zero: int = 0) -> Layout:
    """Returns the layout of this strategy on the first devices."""
    return Layout.of(ParallelStrategy(dp=dp, tp=tp, pp=pp, sequence_parallel=sp, zero_stage=zero))


def random_tree(model: Model, seed: int = 0, scale: float = 0.2) -> Tree:
    """Returns host parameters of which no leaf is special: biases are not 0, norms not 1."""

    def draw(path: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        rng = np.random.default_rng([seed, *path.encode()])
        return (rng.standard_normal(leaf.shape) * scale + path.endswith("scale")).astype(np.float32)

    return map_paths(draw, model.abstract)


def with_empty_layers(model: Model, num_empty: int) -> Model:
    """Returns the same model with empty layers at the end of its stack."""
    return build_model(replace(model.config, num_empty_layers=num_empty))


def fill_up(params: Tree, num_empty: int) -> Tree:
    """Returns host parameters (or anything of their shapes) with zeros for empty layers."""
    return {
        **params,
        "layers": jax.tree.map(lambda x: np.pad(x, [(0, num_empty)] + [(0, 0)] * (x.ndim - 1)), params["layers"]),
    }


def cut_empty(model: Model, params: Tree) -> tuple[Tree, list[np.ndarray]]:
    """Returns the parameters without empty layers, and the leaves of those."""
    num_layers, layers = model.config.num_layers, params["layers"]
    real = {**params, "layers": jax.tree.map(lambda x: np.asarray(x)[:num_layers], layers)}
    return real, [np.asarray(x)[num_layers:] for x in jax.tree.leaves(layers)]


def place_params(model: Model, params: Tree, layout: Layout, rules: Rules | None = None) -> Tree:
    """Returns the parameters on the layout's devices, by default where the optimizer keeps its master copy."""
    rules = optimizer_rules(layout.strategy) if rules is None else rules
    return jax.device_put(params, tree_shardings(model.axes, model.abstract, rules, layout))


def make_examples(
    lengths: Sequence[int], seed: int = 0, vocab_size: int = 96, prompt_share: float = 0.3
) -> list[dict[str, np.ndarray]]:
    """Returns sequences of random tokens whose last part, if anything, is to be learned."""
    rng = np.random.default_rng(seed)
    return [
        {
            "tokens": rng.integers(1, vocab_size, n, dtype=np.int32),
            "loss_mask": np.arange(n) >= max(1, int(prompt_share * n)),
        }
        for n in lengths
    ]


def pack_in_order(
    examples: Sequence[dict[str, np.ndarray]],
    row_len: int,
    *,
    order: Iterable[int] | None = None,
    num_rows: int | None = None,
) -> tuple[Batch, PackPlan]:
    """Returns the sequences put in `order` into row after row, empty rows last; row_len of the longest: one a row."""
    rows: list[list[int]] = [[]]
    lengths = tuple(len(example["tokens"]) for example in examples)
    for i in range(len(examples)) if order is None else order:
        if sum(lengths[j] for j in rows[-1]) + lengths[i] > row_len:
            rows.append([])
        rows[-1].append(i)
    plan = PackPlan(row_len=row_len, rows=tuple(map(tuple, rows)), lengths=lengths)
    return pack(examples, plan, num_rows=num_rows), plan


def unpack_array(array: Any, plan: PackPlan) -> list[np.ndarray]:
    """Returns an array's part of each sequence, in the plan's order: `[L, ...]` of `[R, T, ...]`, 0-d of `[R, S]`."""
    array = np.asarray(array)
    assert plan.num_segments != plan.row_len, "the width does not tell which of the two it is"
    is_per_token = array.shape[1] == plan.row_len
    places = {index: (row, tokens if is_per_token else segment) for index, row, segment, tokens in plan.places()}
    return [array[places[index]] for index in range(len(plan.lengths))]


def one_per_row(examples: Sequence[dict[str, np.ndarray]]) -> tuple[Batch, PackPlan]:
    """Returns one sequence a row, padded on the right to the longest."""
    lengths = tuple(len(example["tokens"]) for example in examples)
    plan = PackPlan(row_len=max(lengths), rows=tuple((i,) for i in range(len(lengths))), lengths=lengths)
    return pack(examples, plan), plan


def relative_errors(found: Tree, expected: Tree) -> dict[str, float]:
    """Returns |found - expected| / |expected| of every leaf, in 2-norms."""
    found, expected = flatten_paths(found), flatten_paths(expected)
    assert found.keys() == expected.keys()
    return {
        path: float(np.linalg.norm(np.asarray(found[path], np.float64) - expected[path]) / np.linalg.norm(leaf))
        for path, leaf in expected.items()
    }


def assert_close_in_norm(found: Tree, expected: Tree, tolerance: float) -> None:
    """Fails, naming leaves, where a leaf differs by more than `tolerance` of its norm."""
    errors = relative_errors(found, expected)
    assert max(errors.values()) <= tolerance, {path: e for path, e in errors.items() if not e <= tolerance}


def assert_bitwise_equal(found: Tree, expected: Tree) -> None:
    """Fails, naming leaves, where a bit differs; nan equals itself."""
    found, expected = flatten_paths(found), flatten_paths(expected)
    assert found.keys() == expected.keys()
    differing = [p for p in found if np.asarray(found[p]).tobytes() != np.asarray(expected[p]).tobytes()]
    assert not differing


def device_bytes(tree: Tree, device: jax.Device) -> int:
    """Returns the bytes that `device` holds of a tree's arrays."""
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == device
    )
