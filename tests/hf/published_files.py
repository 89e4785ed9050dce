"""Tiny checkpoints of public architectures, and their leaves by a table of rules: without a model, as we have none."""

import re
from math import prod
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from realjax.core.trees import Tree
from realjax.hf.dims import Shape, parse_dims
from realjax.hf.files import DTYPES, CheckpointFiles
from realjax.hf.load import make_fill, place_leaf
from realjax.hf.pieces import Piece, group_by_leaf, list_pieces, list_tensors
from realjax.hf.rules import LAYERS
from realjax.hf.save import OutTensor
from tests.given.models import SIZES
from tests.hf.published import LETTERS, Published


def make_published(out_dir: Path, published: Published, dtype: str) -> Path:
    """Writes a random checkpoint with transformers, of which every tensor is random."""
    torch = pytest.importorskip("torch")
    import transformers

    config_class, model_class = published.classes
    config = getattr(transformers, config_class)(**SIZES, pad_token_id=0, **published.config)
    torch.manual_seed(1)
    model = getattr(transformers, model_class)(config)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.normal_()
    model.to(getattr(torch, dtype)).save_pretrained(out_dir)
    return out_dir


def measure_dim(factors: tuple[str, ...], sizes: dict[str, int]) -> int:
    size = lambda text: sum(int(x) if x.isdigit() else sizes[x] for x in re.findall(r"\w+", text))
    return prod(map(size, factors))


def find_shapes(published: Published, names: set[str]) -> dict[str, Shape]:
    """Returns the leaves of a model that has a leaf wherever a rule finds its tensor."""
    sizes = {**LETTERS, **published.sizes}
    shapes: dict[str, Shape] = {}
    for rule in published.rules:
        ours = tuple(measure_dim(dim, sizes) for dim in parse_dims(rule.dims_of_one)[1])
        ours = (sizes["E"], *ours) if rule.per_expert else ours
        if not rule.stacked:
            shapes |= {rule.path: ours} if rule.name in names else {}
            continue
        for stack, numbers in published.layer_numbers.items():
            if rule.name.format(layer=numbers[0], expert=0) in names:
                shapes[stack + rule.path.removeprefix(LAYERS)] = (len(numbers), *ours)
    return shapes


def find_all(source: Path, published: Published) -> tuple[CheckpointFiles, dict[str, Shape], list[Piece]]:
    """Returns the files, the shapes of the leaves that they make, and the pieces of those."""
    files = CheckpointFiles.open(source)
    shapes = find_shapes(published, set(files.tensors))
    sizes = {**LETTERS, **published.sizes}
    return files, shapes, list_pieces(published.rules, shapes, published.layer_numbers, sizes)


def load_published(files: CheckpointFiles, shapes: dict[str, Shape], pieces: list[Piece], mesh: Mesh) -> Tree:
    """Returns the leaves by path in float32, the first two dims split over the mesh's axes where they divide."""
    leaves = {}
    for path, parts in group_by_leaf(pieces).items():
        spec, axes = [None] * len(shapes[path]), list(mesh.axis_names)
        for dim, size in enumerate(shapes[path][:2]):
            if axes and size % mesh.shape[axes[0]] == 0:
                spec[dim] = axes.pop(0)
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        leaves[path] = place_leaf(make_fill(files, parts), shapes[path], sharding, np.dtype(np.float32))
    return leaves


def list_outputs(files: CheckpointFiles, pieces: list[Piece]) -> list[OutTensor]:
    """Returns the tensors to write, in their dtypes of now."""
    dtypes = {name: np.dtype(DTYPES[info.dtype]) for name, info in files.tensors.items()}
    return [OutTensor(tensor=tensor, dtype=dtypes[tensor.name]) for tensor in list_tensors(pieces)]
