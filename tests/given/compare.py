"""Ways to compare what two computations or two runs gave."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from realjax.core.metrics import summarize
from realjax.core.trees import Tree, flatten_paths

# What differs between two runs that do the same: clocks, and what was predicted of them, which goes by the machine.
CLOCKS = ("time", "seconds", "tokens_per_second", "tflops", "predicted", "save_seconds")


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
    assert not find_differing(flatten_paths(found), flatten_paths(expected))


def find_differing(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Returns the names of arrays that differ in a bit, or that only one side has; nan equals itself."""
    bits = [{name: np.asarray(array).tobytes() for name, array in side.items()} for side in (found, expected)]
    return [name for name in sorted(found.keys() | expected.keys()) if bits[0].get(name) != bits[1].get(name)]


def without_clocks(records: Iterable[Mapping[str, Any]], *more: str) -> list[dict[str, Any]]:
    """Returns metrics records without what a clock put into them or was predicted, and without `more`.

    They are named alike, whether of the step or, as `time/<call>`, of a call.
    """
    left_out = {*CLOCKS, *more}
    return [{k: value for k, value in record.items() if k.partition("/")[0] not in left_out} for record in records]


def as_numbers(updates: list[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Returns a call's metrics as plain numbers, one dict for each update."""
    return [summarize([update]) for update in updates]


def device_bytes(tree: Tree, device: jax.Device) -> int:
    """Returns the bytes that `device` holds of a tree's arrays."""
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == device
    )
