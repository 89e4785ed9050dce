"""The tensors of public architectures, each described by a table of rules: from their files to leaves and back."""

import re
from math import prod
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from realjax.hf.dims import Shape, parse_dims
from realjax.hf.files import DTYPES, CheckpointFiles
from realjax.hf.load import make_fill, match_files, place_leaf
from realjax.hf.pieces import Piece, group_by_leaf, list_pieces, list_tensors
from realjax.hf.rules import LAYERS
from realjax.hf.save import OutTensor, make_fetch, write_tensors
from tests.hf.published import LETTERS, PUBLISHED, Published
from tests.hf.tiny import SIZES, tensors_of


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
    files = CheckpointFiles.open(source)
    shapes = find_shapes(published, set(files.tensors))
    sizes = {**LETTERS, **published.sizes}
    return files, shapes, list_pieces(published.rules, shapes, published.layer_numbers, sizes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_is_in_a_leaf_once_and_the_way_back_is_bitwise(name, dtype, tmp_path):
    published = PUBLISHED[name]
    source = make_published(tmp_path / "hf", published, dtype)
    files, shapes, pieces = find_all(source, published)
    match_files(files, pieces)  # none is missing, left over or of another shape
    place = SingleDeviceSharding(jax.devices()[0])
    leaves = {
        path: place_leaf(make_fill(files, parts), shapes[path], place, np.dtype(np.float32))
        for path, parts in group_by_leaf(pieces).items()
    }
    assert sum(leaf.size for leaf in leaves.values()) == sum(prod(shape) for shape in files.shapes.values())
    out = [
        OutTensor(tensor=tensor, dtype=np.dtype(DTYPES[files.tensors[tensor.name].dtype]))
        for tensor in list_tensors(pieces)
    ]
    (tmp_path / "back").mkdir()
    write_tensors(tmp_path / "back", out, make_fetch(leaves), max_shard_bytes=30_000)
    assert tensors_of(tmp_path / "back") == tensors_of(source)
