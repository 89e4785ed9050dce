"""From a sharded parameter tree to a HuggingFace checkpoint: one tensor at a time passes through the host, or a copy of
all is made there first, which is written beside what the devices do next.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import prod
from pathlib import Path
from typing import BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from realjax.core.end_tokens import EndTokens
from realjax.core.faults import naming
from realjax.core.json_text import JsonObject
from realjax.core.manifest import write_manifest
from realjax.core.trees import Tree, flatten_paths
from realjax.hf.families import find_family
from realjax.hf.files import DTYPES, INDEXES, SINGLES, CheckpointFiles
from realjax.hf.pieces import FetchFn, HFTensor, Piece, find_pieces, list_tensors, make_tensor
from realjax.hf.save_config import write_config
from realjax.models.config import ModelConfig

DTYPE_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class OutTensor:
    """A tensor to be written and the dtype it is written in."""

    tensor: HFTensor
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        return prod(self.tensor.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a checkpoint holds beside parameters, and how these are written.

    Tokenizer, generation config and unknown config keys come from `source_dir`; `ends` is what ends a text where the
    model was trained on another end than the source says. With `dtype` "source" a tensor has the dtype that it has
    there, or without a source that of the parameters.
    """

    config: ModelConfig
    source_dir: str | Path | None = None
    dtype: DTypeLike | str = "source"
    max_shard_bytes: float = 5e9
    ends: EndTokens | None = None


def save_hf(
    params: Tree,
    config: ModelConfig,
    out_dir: str | Path,
    *,
    source_dir: str | Path | None = None,
    dtype: DTypeLike | str = "source",
    max_shard_bytes: float = 5e9,
    ends: EndTokens | None = None,
) -> None:
    """Writes `params` as a HuggingFace directory, see `Target`. It appears whole or not at all, and replaces one that
    is there.

    Every process calls this; the first that holds `params` writes. Raises ValueError when the parameters are not those
    of `config`.
    """
    target = Target(
        config=config, source_dir=source_dir, dtype=dtype, max_shard_bytes=max_shard_bytes, ends=ends
    )  # fmt: skip
    begin_save(params, target, Path(out_dir), most_bytes=0)()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("save_hf: written")


def begin_save(params: Tree, target: Target, out_dir: Path, *, most_bytes: float) -> Callable[[], None]:
    """Copies `params` off the devices and returns what then writes them, as `save_hf` does, in any thread.

    A model of more than `most_bytes` is written before this returns, through the memory of a tensor. Every process
    calls this; what `find_writer` does not name has nothing to write.
    """
    leaves = flatten_paths(params)
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    tensors = list_tensors(find_pieces(find_family(target.config.family), target.config, shapes))
    config = replace(target.config, num_empty_layers=0)
    out = _choose_dtypes(config, tensors, leaves, target.source_dir, target.dtype)
    fetch = make_fetch(leaves)
    pieces = [piece for tensor in tensors for piece in tensor.pieces]

    def write(fetch_fn: FetchFn) -> None:
        with naming(out_dir), replace_directory(out_dir) as temp:
            write_config(config, temp, target.source_dir, np.result_type(*{item.dtype for item in out}), target.ends)
            write_tensors(temp, out, fetch_fn, target.max_shard_bytes)
            write_manifest(temp)

    if jax.process_index() != find_writer(params):
        for piece in pieces:
            fetch(piece)
    elif sum(leaf.nbytes for leaf in leaves.values()) > most_bytes:
        write(fetch)
    else:
        return partial(write, hold_pieces(pieces, fetch))
    return _nothing


def hold_pieces(pieces: Iterable[Piece], fetch_fn: FetchFn) -> FetchFn:
    """Returns what gives the pieces from this process's memory, into which they are fetched now."""
    held = {(piece.path, piece.index): fetch_fn(piece) for piece in pieces}
    return lambda piece: held[piece.path, piece.index]


def _nothing() -> None:
    """Does nothing."""


def find_writer(params: Tree) -> int:
    """Returns the number of the first process that holds `params`."""
    return min(device.process_index for device in jax.tree.leaves(params)[0].sharding.device_set)


@contextmanager
def replace_directory(out_dir: Path) -> Iterator[Path]:
    """Yields a new directory that is called `out_dir`, in the place of any other, when the block ends well.

    When the block fails, the new one is removed and the other stays.
    """
    temp, old = (out_dir.with_name(f".{out_dir.name}.{state}") for state in ("writing", "replaced"))
    shutil.rmtree(temp, ignore_errors=True)  # left by a killed run
    temp.mkdir(parents=True)
    try:
        yield temp
        shutil.rmtree(old, ignore_errors=True)
        if out_dir.exists():
            os.replace(out_dir, old)
        os.replace(temp, out_dir)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _choose_dtypes(
    config: ModelConfig,
    tensors: list[HFTensor],
    leaves: Mapping[str, jax.Array],
    source_dir: str | Path | None,
    dtype: DTypeLike | str,
) -> list[OutTensor]:
    """Returns each tensor with the dtype to write: `dtype`, else its own in the source, else its leaf's."""
    if isinstance(dtype, str) and dtype == "source":
        family, num_layers = find_family(config.family), config.num_layers
        files = CheckpointFiles.open(source_dir).respelled(family, num_layers) if source_dir else None

        def choose(tensor: HFTensor) -> np.dtype:
            if files is None:
                return np.dtype(leaves[tensor.pieces[0].path].dtype)
            info = files.tensors.get(tensor.name)
            return np.dtype(DTYPES[info.dtype]) if info and info.dtype in DTYPES else files.dtype
    else:
        fixed = np.dtype(dtype)

        def choose(tensor: HFTensor) -> np.dtype:
            return fixed

    return [OutTensor(tensor=tensor, dtype=choose(tensor)) for tensor in tensors]


def _fill_shards(tensors: list[OutTensor], max_shard_bytes: float) -> list[list[OutTensor]]:
    """Returns the tensors of each file: as many as `max_shard_bytes` hold, or one that is larger."""
    shards: list[list[OutTensor]] = [[]]
    size = 0
    for item in tensors:
        if shards[-1] and size + item.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.num_bytes
    return shards


def write_tensors(
    out_dir: Path, tensors: list[OutTensor], fetch_fn: FetchFn, max_shard_bytes: float, name: str = SINGLES[0]
) -> None:
    """Writes files of at most that size and their index; one tensor at a time, and what makes it, is in host memory."""
    whole, (stem, suffix) = name, os.path.splitext(name)
    shards = _fill_shards(tensors, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        name = whole if len(shards) == 1 else f"{stem}-{i:05}-of-{len(shards):05}{suffix}"
        weight_map |= {item.tensor.name: name for item in shard}
        with open(out_dir / name, "wb") as file:
            _write_header(file, shard)
            for item in shard:
                file.write(make_tensor(item.tensor, fetch_fn, item.dtype).reshape(-1).view(np.uint8).data)
    if len(shards) > 1:
        total = sum(item.num_bytes for shard in shards for item in shard)
        index: JsonObject = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out_dir / INDEXES[0]).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_header(file: BinaryIO, shard: list[OutTensor]) -> None:
    """Writes safetensors' head: the length of a json of names, dtypes, shapes and offsets, then that json.

    `safetensors.save_file` would need all tensors of the file in memory, twice; with the head first they stream.
    """
    header: JsonObject = {"__metadata__": {"format": "pt"}}
    offset = 0
    for item in shard:
        end = offset + item.num_bytes
        shape = list(item.tensor.shape)
        header[item.tensor.name] = {"dtype": DTYPE_NAMES[item.dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    file.write(len(text).to_bytes(8, "little") + text)


def make_fetch(leaves: Mapping[str, jax.Array]) -> FetchFn:
    """Returns `fetch(piece)`: the leaf of the piece, or the layer or expert of it, whole on this host.

    Every process that owns devices of the leaves' mesh calls it for the same pieces; in others the result is not right.
    """
    sharding = next(iter(leaves.values())).sharding
    if len({device.process_index for device in sharding.device_set}) == 1:
        return lambda piece: _assemble(leaves[piece.path], piece.index)
    if not isinstance(sharding, NamedSharding):
        raise ValueError(f"save: parameters spread over processes by {sharding}; place them by a Layout's shardings")
    gather = jax.jit(_take, out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))
    take = jax.jit(_take)

    @lru_cache(maxsize=1)
    def on_devices(path: str) -> jax.Array:
        # Programs do not read host memory as it is; leaf by leaf, for the devices may have no room for all.
        leaf = leaves[path]
        is_there = leaf.sharding.memory_kind in (None, "device")
        return leaf if is_there else jax.device_put(leaf, leaf.sharding.with_memory_kind("device"))

    @lru_cache(maxsize=1)
    def layer_on_devices(path: str, layer: int) -> jax.Array:
        return take(on_devices(path), layer)

    def fetch(piece: Piece) -> np.ndarray:
        if len(piece.index) == 2:  # an expert: each would read the whole leaf without its layer in between
            x = gather(layer_on_devices(piece.path, piece.index[0]), piece.index[1])
        else:
            x = gather(on_devices(piece.path), *piece.index)
        return np.asarray(x.addressable_data(0)) if x.addressable_shards else np.empty(x.shape, x.dtype)

    return fetch


def _take(x: jax.Array, i: int | None = None) -> jax.Array:
    """Returns `x`, or `x[i]` bit for bit: a masked sum stays sharded, while indexing would first gather all of `x`."""
    if i is None:
        return x
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    chosen = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) == i
    return jax.lax.bitcast_convert_type(jnp.where(chosen, bits, 0).sum(0, dtype=bits.dtype), x.dtype)


def _assemble(leaf: jax.Array, index: tuple[int, ...]) -> np.ndarray:
    """Returns `leaf[index]`, put together from its shards without a replica on any device."""
    depth = len(index)
    out = np.empty(leaf.shape[depth:], leaf.dtype)
    for shard in leaf.addressable_shards:
        bounds = [s.indices(size)[:2] for s, size in zip(shard.index, leaf.shape[:depth])]
        if shard.replica_id == 0 and all(start <= i < stop for i, (start, stop) in zip(index, bounds)):
            local = tuple(i - start for i, (start, _) in zip(index, bounds))
            out[shard.index[depth:]] = np.asarray(shard.data[local] if index else shard.data)
    return out
