"""From a checkpoint directory to a sharded parameter tree; a process reads only what its devices hold."""

from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from realjax.core.trees import Tree, flatten_paths, unflatten_paths
from realjax.hf.families import config_from_hf, find_family
from realjax.hf.files import CONFIG, DTYPES, CheckpointFiles, read_json
from realjax.hf.rules import CRITIC_HEAD_NAME, HEAD, Rule, Shape, check_tensors, hf_tensors, leaf_rules, real_shapes
from realjax.models.build import Model, build_model
from realjax.models.config import ModelConfig

FillFn = Callable[[tuple[slice, ...]], np.ndarray]  # the values of a slice of a leaf
CastFn = Callable[[tuple[slice, ...], np.dtype], np.ndarray]  # the same in a dtype
TABLE, TABLE_NAME, LM_HEAD_NAME = "embed/table", "model.embed_tokens.weight", "lm_head.weight"
COMPARED_AT_ONCE = 1 << 24  # numbers of a table


def load_config(path: str | Path) -> ModelConfig:
    """Returns the model that a directory's config.json describes. Raises ValueError when there is none we know."""
    file = Path(path) / CONFIG
    return config_from_hf(read_json(file, "model path"), str(file))


def load_checkpoint_config(path: str | Path) -> ModelConfig:
    """Returns the model that a directory's weights make: config.json's, but untied where they hold a head of their own.

    That is what transformers loads then. Reads both tables where a file has them. Raises ValueError as `load_config`.
    """
    config = load_config(path)
    return replace(config, tied=False) if config.tied and _has_own_head(CheckpointFiles.open(path)) else config


def _has_own_head(files: CheckpointFiles) -> bool:
    """Returns whether the files have a head of the shape of the embedding table, and other values."""
    shapes = {files.shapes.get(name) for name in (TABLE_NAME, LM_HEAD_NAME)}
    if len(shapes) > 1 or (shape := shapes.pop()) is None:
        return False
    rows = max(1, COMPARED_AT_ONCE // shape[1])
    for start in range(0, shape[0], rows):
        window = (slice(start, min(start + rows, shape[0])), slice(0, shape[1]))
        with files.reader() as read:
            if not np.array_equal(read(TABLE_NAME, window), read(LM_HEAD_NAME, window)):
                return True
    return False


def count_params(config: ModelConfig) -> int:
    """Returns the number of scalars in a model's parameters; nothing is allocated."""
    return build_model(config).num_params


def check_weights(path: str | Path, config: ModelConfig, *, has_new_head: bool = False) -> None:
    """Raises ValueError when a directory's files are not whole, or not those of the model; reads their heads only.

    With `has_new_head` the model is a critic whose head does not come from there.
    """
    shapes = {name: leaf.shape for name, leaf in flatten_paths(build_model(config).abstract).items()}
    _match(CheckpointFiles.open(path), config, shapes, {HEAD} if has_new_head else ())


def load_params(
    path: str | Path,
    model: Model,
    shardings: Tree,
    *,
    dtype: DTypeLike = jnp.float32,
    fresh: Mapping[str, FillFn] | None = None,
) -> Tree:
    """Returns the parameters of `model` in `dtype`, placed by `shardings`, from the directory `path`.

    Leaf by leaf and device by device: host memory stays near one device's part of one leaf. Every process calls this.
    A critic's `head/kernel` comes from `fresh["head/kernel"]` where that is given, else from the checkpoint.
    Raises ValueError, before any tensor is read, when the checkpoint's tensors are not the model's.
    """
    files = CheckpointFiles.open(path)
    shapes = {name: leaf.shape for name, leaf in flatten_paths(model.abstract).items()}
    rules = _match(files, model.config, shapes, fresh or {})
    places = flatten_paths(shardings)
    leaves = {}
    for name, shape in shapes.items():
        if name in rules:
            fill = _make_fill(files, rules[name], shape, model.config.num_layers)
        else:
            fill = _without_files((fresh or {})[name])
        leaves[name] = _place(fill, shape, places[name], jnp.dtype(dtype))
    return unflatten_paths(leaves)


def has_critic_head(path: str | Path) -> bool:
    """Returns whether a checkpoint holds a scalar head, as critics and reward models saved here or by ReaL do."""
    return _critic_head_name(CheckpointFiles.open(path)) is not None


def _critic_head_name(files: CheckpointFiles) -> str | None:
    for name in (CRITIC_HEAD_NAME, LM_HEAD_NAME):
        if name in files.tensors and files.tensors[name].shape[0] == 1:
            return name
    return None


def _match(
    files: CheckpointFiles, config: ModelConfig, shapes: Mapping[str, Shape], fresh: Container[str]
) -> dict[str, Rule]:
    """Returns the rule of every leaf to be read from `files`. Raises ValueError when tensors and model differ."""
    rules = leaf_rules(find_family(config.family), config, shapes)
    optional: set[str] = set()
    if config.tied:
        # Some writers store the table twice, and some under the head's name.
        if files.shapes.get(LM_HEAD_NAME) == files.shapes.get(TABLE_NAME):
            optional.add(LM_HEAD_NAME)
        elif TABLE_NAME not in files.tensors:
            rules[TABLE] = replace(rules[TABLE], name=LM_HEAD_NAME)
    if config.is_critic:
        if HEAD in fresh:
            del rules[HEAD]
            optional |= {LM_HEAD_NAME, CRITIC_HEAD_NAME}
        elif (name := _critic_head_name(files)) is not None:
            rules[HEAD] = Rule(HEAD, name, rules[HEAD].dims)
    tensors = hf_tensors(rules, real_shapes(rules, shapes, config.num_layers))
    expected = {tensor.name: tensor.shape for tensor in tensors}
    subject = f"checkpoint '{files.directory}'"
    check_tensors(subject, expected, files.shapes, frozenset(optional))
    for name in expected:
        if (stored := files.tensors[name].dtype) not in DTYPES:
            raise ValueError(
                f"{subject}: tensor '{name}' is stored as {stored}; needed one of {', '.join(DTYPES)}: "
                "give the unquantised checkpoint"
            )
    return rules


def _make_fill(files: CheckpointFiles, rule: Rule, shape: Shape, num_layers: int) -> CastFn:
    """Returns `fill(index, dtype)`, which reads that slice of the leaf, layer after layer into one array.

    Of a stack, what follows the first `num_layers` is 0.
    """

    def fill(index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        out = np.empty([len(range(*s.indices(n))) for s, n in zip(index, shape)], dtype)
        with files.reader() as read:
            if not rule.stacked:
                out[...] = rule.read(read, rule.name, shape, index)
                return out
            for i, layer in enumerate(range(*index[0].indices(shape[0]))):
                is_real = layer < num_layers
                out[i] = rule.read(read, rule.name.format(layer=layer), shape[1:], index[1:]) if is_real else 0
        return out

    return fill


def _without_files(fill: FillFn) -> CastFn:
    return lambda index, dtype: fill(index).astype(dtype)


def _place(fill: CastFn, shape: Shape, sharding: Sharding, dtype: np.dtype) -> jax.Array:
    """Returns the array, filled one distinct slice at a time: replicas share a read, no two slices wait on the host."""
    by_slice: dict[tuple[tuple[int, int], ...], list] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index or [slice(None)] * len(shape), shape))
        by_slice.setdefault(bounds, []).append(device)
    shards: list[jax.Array] = []
    for bounds, devices in by_slice.items():
        part = fill(tuple(slice(*pair) for pair in bounds), dtype)
        targets = [SingleDeviceSharding(device, memory_kind=sharding.memory_kind) for device in devices]
        shards += jax.block_until_ready([jax.device_put(part, target) for target in targets])
    return jax.make_array_from_single_device_arrays(shape, sharding, shards, dtype=dtype)
