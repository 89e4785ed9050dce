"""From a checkpoint directory to a sharded parameter tree; a process reads only what its devices hold."""

import logging
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from realjax.core.trees import Tree, flatten_paths, unflatten_paths
from realjax.hf.dims import Shape, Window
from realjax.hf.families import config_from_hf, find_family
from realjax.hf.files import CONFIG, DTYPES, CheckpointFiles, read_json
from realjax.hf.pieces import (
    CRITIC_HEAD_NAME,
    Piece,
    check_tensors,
    find_pieces,
    group_by_leaf,
    list_tensors,
    read_leaf,
)
from realjax.hf.rules import HEAD, TABLE
from realjax.models.build import Model, build_model
from realjax.models.config import ModelConfig

logger = logging.getLogger(__name__)

FillFn = Callable[[Window], np.ndarray]  # the values of a slice of a leaf
CastFn = Callable[[Window, np.dtype], np.ndarray]  # the same in a dtype
CRITIC_HEAD_NAMES = (CRITIC_HEAD_NAME, "lm_head.weight")  # transformers' and ReaL's
COMPARED_AT_ONCE = 1 << 24  # numbers of a table


def load_config(path: str | Path) -> ModelConfig:
    """Returns the model that a directory's config.json describes. Raises ValueError when there is none we know."""
    file = Path(path) / CONFIG
    return config_from_hf(read_json(file, "model path"), str(file))


def correct_config(config: ModelConfig, path: str | Path) -> ModelConfig:
    """Returns the model that a directory's weights make: config.json's, but untied where they hold a head of their own.

    That is what transformers loads then. Reads both tables where a file has them.
    """
    if not config.tied:
        return config
    family = find_family(config.family)
    files = CheckpointFiles.open(path).respelled(family, config.num_layers)
    own = _differ(files, family.name_tensor(TABLE), family.name_tensor(HEAD))
    return replace(config, tied=False) if own else config


def _differ(files: CheckpointFiles, table: str, head: str) -> bool:
    """Returns whether the files have both tensors in one shape, and other values in the second."""
    shapes = {files.shapes.get(name) for name in (table, head)}
    if len(shapes) > 1 or (shape := shapes.pop()) is None:
        return False
    rows = max(1, COMPARED_AT_ONCE // shape[1])
    for start in range(0, shape[0], rows):
        window = (slice(start, min(start + rows, shape[0])), slice(0, shape[1]))
        with files.reader() as read:
            if not np.array_equal(read(table, window), read(head, window)):
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
    _match(_open(path, config), config, shapes, {HEAD} if has_new_head else ())


def load_params(
    path: str | Path,
    model: Model,
    shardings: Tree,
    *,
    dtype: DTypeLike = jnp.float32,
    fresh: Mapping[str, FillFn] | None = None,
) -> Tree:
    """Returns the parameters of `model` as a copy of `dtype` (see `Model.copy_dtype`), placed by `shardings`, from the
    directory `path`; `shardings` may be of some of them alone.

    Leaf by leaf and device by device: host memory stays near one device's part of one leaf. Every process calls this.
    A critic's `head/kernel` comes from `fresh["head/kernel"]` where that is given, else from the checkpoint.
    Raises ValueError, before any tensor is read, when the checkpoint's tensors are not the model's.
    """
    files = _open(path, model.config, told=True)
    shapes = {name: leaf.shape for name, leaf in flatten_paths(model.abstract).items()}
    pieces = _match(files, model.config, shapes, fresh or {})
    places = flatten_paths(shardings)
    leaves = {}
    for name, shape in ((name, shape) for name, shape in shapes.items() if name in places):
        fill = make_fill(files, pieces[name]) if name in pieces else _without_files((fresh or {})[name])
        leaves[name] = place_leaf(fill, shape, places[name], model.copy_dtype(name, dtype))
    return unflatten_paths(leaves)


def _open(path: str | Path, config: ModelConfig, *, told: bool = False) -> CheckpointFiles:
    """Returns the files by the names of the model's family; with `told`, the log says what is no part of it."""
    whole = CheckpointFiles.open(path)
    files = whole.respelled(find_family(config.family), config.num_layers)
    if told and (num_left_out := len(whole.tensors) - len(files.tensors)):
        counts = len(whole.tensors), num_left_out
        logger.info("%s: of %d tensors %d are no part of the text model; exports leave them out too", path, *counts)
    return files


def has_critic_head(path: str | Path) -> bool:
    """Returns whether a checkpoint holds a scalar head, as critics and reward models saved here or by ReaL do."""
    return _critic_head_name(CheckpointFiles.open(path)) is not None


def _critic_head_name(files: CheckpointFiles) -> str | None:
    return next((name for name in CRITIC_HEAD_NAMES if name in files.tensors and files.shapes[name][0] == 1), None)


def _match(
    files: CheckpointFiles, config: ModelConfig, shapes: Mapping[str, Shape], fresh: Container[str]
) -> dict[str, list[Piece]]:
    """Returns the pieces of every leaf to be read from `files`. Raises ValueError when tensors and model differ."""
    family = find_family(config.family)
    table, head = family.name_tensor(TABLE), family.name_tensor(HEAD)
    names: dict[str, str] = {}
    optional: set[str] = set()
    if config.tied:
        # Some writers store the table twice, and some under the head's name.
        if files.shapes.get(head) == files.shapes.get(table):
            optional.add(head)
        elif table not in files.tensors:
            names[TABLE] = head
    if config.is_critic:
        if HEAD in fresh:
            optional |= {head, CRITIC_HEAD_NAME}
        elif (name := _critic_head_name(files)) is not None:
            names[HEAD] = name
    pieces = find_pieces(family, config, {path: x for path, x in shapes.items() if path not in fresh}, names)
    match_files(files, pieces, frozenset(optional))
    return group_by_leaf(pieces)


def match_files(files: CheckpointFiles, pieces: Iterable[Piece], optional: frozenset[str] = frozenset()) -> None:
    """Raises ValueError when the files do not have all tensors of the pieces and no others (but `optional`)."""
    subject = f"checkpoint '{files.directory}'"
    tensors = list_tensors(pieces)
    check_tensors(subject, tensors, files.shapes, optional)
    for name in (tensor.name for tensor in tensors):
        if (stored := files.tensors[name].dtype) not in DTYPES:
            raise ValueError(
                f"{subject}: tensor '{name}' is stored as {stored}; needed one of {', '.join(DTYPES)}: "
                "give the unquantised checkpoint"
            )


def make_fill(files: CheckpointFiles, pieces: Iterable[Piece]) -> CastFn:
    """Returns `fill(index, dtype)`, which reads that slice of the leaf of these pieces into one array."""

    def fill(index: Window, dtype: np.dtype) -> np.ndarray:
        with files.reader() as read:
            return read_leaf(pieces, read, index, dtype)

    return fill


def _without_files(fill: FillFn) -> CastFn:
    return lambda index, dtype: fill(index).astype(dtype)


def place_leaf(fill: CastFn, shape: Shape, sharding: Sharding, dtype: np.dtype) -> jax.Array:
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
