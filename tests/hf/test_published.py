"""The tensors of public architectures, each described by a table of rules: from their files to leaves and back."""

import tracemalloc
from math import prod
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.hf.families.tables import change
from realjax.hf.files import SafetensorsFile, TorchFile
from realjax.hf.load import match_files
from realjax.hf.pieces import list_pieces, list_tensors
from realjax.hf.save import OutTensor, make_fetch, write_tensors
from tests.given.checkpoints import make_bin, read_tensors
from tests.given.processes import run_workers
from tests.hf.published import PUBLISHED, list_experts
from tests.hf.published_files import find_all, list_outputs, load_published, make_published

ONE = jax.make_mesh((1, 1), ("a", "b"), devices=jax.devices()[:1])
FOUR = jax.make_mesh((2, 2), ("a", "b"), devices=jax.devices()[:4])


def count_numbers(monkeypatch: pytest.MonkeyPatch, files: type[SafetensorsFile] | type[TorchFile]) -> list[int]:
    """Returns a list to which every read of such files adds how many numbers it got."""
    num_read: list[int] = []
    read = files.read

    def counted(file, name, window):
        part = read(file, name, window)
        num_read.append(part.size)
        return part

    monkeypatch.setattr(files, "read", counted)
    return num_read


@pytest.mark.parametrize(
    ("dtype", "mesh"),
    [pytest.param("float32", ONE, id="float32"), pytest.param("bfloat16", FOUR, id="bfloat16", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_is_in_a_leaf_once_and_the_way_back_is_bitwise(name, dtype, mesh, tmp_path, monkeypatch):
    published = PUBLISHED[name]
    source = make_published(tmp_path / "hf", published, dtype)
    files, shapes, pieces = find_all(source, published)
    match_files(files, pieces)  # none is missing, left over or of another shape
    num_numbers = sum(prod(shape) for shape in files.shapes.values())
    assert sum(prod(shape) for shape in shapes.values()) == num_numbers
    num_read = count_numbers(monkeypatch, SafetensorsFile)
    leaves = load_published(files, shapes, pieces, mesh)
    # Replicas share what is read. Gate and up of gpt-oss, number by number in one tensor, are read for each of both.
    twice = sum(prod(shape) for name, shape in files.shapes.items() if published.name == "GptOss" and "gate_up" in name)
    assert sum(num_read) == num_numbers + twice
    (tmp_path / "back").mkdir()
    write_tensors(tmp_path / "back", list_outputs(files, pieces), make_fetch(leaves), max_shard_bytes=30_000)
    assert read_tensors(tmp_path / "back") == read_tensors(source)


def test_a_part_of_a_tensor_is_a_part_of_a_bin_file_too(tmp_path, monkeypatch):
    published = PUBLISHED["phi3"]
    source = make_published(tmp_path / "hf", published, "bfloat16")
    make_bin(source, tmp_path / "bin", num_files=2)
    files, shapes, pieces = find_all(tmp_path / "bin", published)
    num_read = count_numbers(monkeypatch, TorchFile)
    leaves = load_published(files, shapes, pieces, FOUR)
    assert sum(num_read) == sum(prod(shape) for shape in files.shapes.values())
    (tmp_path / "back").mkdir()
    write_tensors(tmp_path / "back", list_outputs(files, pieces), make_fetch(leaves), max_shard_bytes=5e9)
    assert read_tensors(tmp_path / "back") == read_tensors(source)


def test_experts_are_written_one_at_a_time(tmp_path):
    """Not layer by layer: of a large model the experts of one are gigabytes."""
    num_layers, E, D, M = 4, 32, 128, 96
    rules = [rule for rule in change(*list_experts("mlp", "gate", "up", "down")) if "experts" in rule.path]
    shapes = {rule.path: (num_layers, E, *((M, D) if "down" in rule.path else (D, M))) for rule in rules}
    tensors = list_tensors(list_pieces(rules, shapes, {"layers": tuple(range(num_layers))}, {}))
    leaves = {path: jax.block_until_ready(jnp.ones(shape)) for path, shape in shapes.items()}
    out = [OutTensor(tensor=tensor, dtype=np.dtype(np.float32)) for tensor in tensors]
    tracemalloc.start()
    try:
        write_tensors(tmp_path, out, make_fetch(leaves), max_shard_bytes=5e9)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    of_layer = 4 * E * D * M
    assert (tmp_path / "model.safetensors").stat().st_size > 3 * num_layers * of_layer
    assert peak < of_layer / 2


@pytest.mark.slow
@pytest.mark.e2e
def test_two_processes_read_parts_and_experts_and_write_them_again(tmp_path):
    names = ("qwen3_moe-sparse", "gpt_oss", "falcon")
    for name in names:
        make_published(tmp_path / name, PUBLISHED[name], "bfloat16")
    run_workers(Path(__file__).with_name("published_worker.py"), 2, tmp_path, str(tmp_path), *names)
    for name in names:
        assert read_tensors(tmp_path / f"{name}-back") == read_tensors(tmp_path / name)
