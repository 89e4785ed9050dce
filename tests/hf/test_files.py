import importlib.util
import json
import shutil

import huggingface_hub
import numpy as np
import pytest

from realjax.hf.files import CheckpointFiles, resolve_model_path
from tests.given.checkpoints import make_bin, make_checkpoint, random_index, read_tensors


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def single(request, tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp(request.param) / "single", "llama", dtype=request.param)


def test_every_format_holds_the_same_tensors(single, tmp_path):
    sharded = make_checkpoint(tmp_path / "sharded", "llama", dtype=_dtype(single), max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    expected = read_tensors(single)
    assert read_tensors(sharded) == expected
    assert read_tensors(make_bin(single, tmp_path / "bin")) == expected
    assert read_tensors(make_bin(single, tmp_path / "legacy", zipped=False)) == expected
    assert read_tensors(make_bin(single, tmp_path / "bins", num_files=3)) == expected


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_window_is_the_slice_of_the_whole(single, form, tmp_path):
    files = CheckpointFiles.open(single if form == "safetensors" else make_bin(single, tmp_path / "bin"))
    rng = np.random.default_rng(0)
    with files.reader() as read:
        for name, shape in files.shapes.items():
            whole, index = read(name, tuple(slice(0, n) for n in shape)), random_index(rng, shape)
            np.testing.assert_array_equal(read(name, index), whole[index])
            assert whole.shape == shape and whole.dtype == files.dtype


def test_a_directory_resolves_to_itself(single):
    assert resolve_model_path(single) == single
    assert resolve_model_path(str(single)) == single


def test_of_a_runs_checkpoints_the_last_is_taken(single, tmp_path):
    for step in (2, 10):
        shutil.copytree(single, tmp_path / f"epoch1epochstep{step}globalstep{step}")
    (tmp_path / "epoch1epochstep11globalstep11").mkdir()  # of a save that was broken off by hand
    assert resolve_model_path(tmp_path) == tmp_path / "epoch1epochstep10globalstep10"


def test_what_is_not_a_model_directory_is_refused(single, tmp_path):
    with pytest.raises(ValueError, match="has no config.json"):
        resolve_model_path(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model_path(tmp_path, need_weights=False) == tmp_path
    with pytest.raises(ValueError, match="architecture 'None' is not supported"):
        resolve_model_path(tmp_path)  # before anyone looks for weights, or fetches them
    shutil.copyfile(single / "config.json", tmp_path / "config.json")
    needed = r"holds no weights; needed model.safetensors or pytorch_model.bin, or their .index.json and shards"
    with pytest.raises(ValueError, match=f"{needed}$"):
        resolve_model_path(tmp_path)
    with pytest.raises(ValueError, match=f"{needed}, or a=True$"):
        resolve_model_path(tmp_path, or_else=", or a=True")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter .*; merge them"):
        resolve_model_path(tmp_path)
    with pytest.raises(ValueError, match="is a file; needed the directory"):
        resolve_model_path(tmp_path / "config.json")
    with pytest.raises(ValueError, match="does not exist; give a model directory or a hub identifier"):
        resolve_model_path(tmp_path / "nowhere")


def test_broken_files_are_named(single, tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="model.safetensors' is not a whole safetensors file"):
        CheckpointFiles.open(tmp_path)
    whole = (single / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        CheckpointFiles.open(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    index = tmp_path / "model.safetensors.index.json"
    for name, message in {
        "model-00001-of-00002.safetensors": "names model-00001-of-00002.safetensors, not in the directory",
        "../model.safetensors": "gives '../model.safetensors' as a file of weights; its weight_map needs a name in",
        str(single / "model.safetensors"): "gives '/.*/model.safetensors' as a file of weights",
        "model.bin": "names model.bin",
        3: "gives 3 as a file of weights",
    }.items():
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(ValueError, match=message):
            CheckpointFiles.open(tmp_path)
    index.write_text("{")
    with pytest.raises(ValueError, match="index.json' is not valid json: malformed JSON"):
        CheckpointFiles.open(tmp_path)


def test_of_several_sets_of_weights_the_one_is_read_that_transformers_takes(single, tmp_path):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    def read_and_theirs():
        (tensor,) = {x[2] for name, x in read_tensors(tmp_path).items() if name == "model.norm.weight"}
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
        return np.frombuffer(tensor, np.float32)[0], float(model.model.norm.weight.detach()[0])

    weights = {name: x.float() for name, x in load_file(single / "model.safetensors").items()}
    shutil.copyfile(single / "config.json", tmp_path / "config.json")
    names = ["pytorch_model.bin.index.json", "pytorch_model.bin"]
    names += ["model.safetensors.index.json", "model.safetensors"]
    # Each set is preferred to those before it.
    for value, name in enumerate(names, start=1):
        weights["model.norm.weight"] = torch.full((32,), float(value))
        is_index, is_bin = name.endswith(".index.json"), "pytorch" in name
        file = f"old-{value}" + (".bin" if is_bin else ".safetensors") if is_index else name
        torch.save(weights, tmp_path / file) if is_bin else save_file(weights, tmp_path / file, {"format": "pt"})
        if is_index:
            index = {"metadata": {"total_size": 0}, "weight_map": dict.fromkeys(weights, file)}
            (tmp_path / name).write_text(json.dumps(index))
        assert read_and_theirs() == (value, value)
    # An index that was left behind without its shards is nobody's business then.
    (tmp_path / "old-3.safetensors").unlink()
    assert read_and_theirs() == (4, 4)


def test_bin_files_without_torch_name_the_extra(single, tmp_path, monkeypatch):
    make_bin(single, tmp_path / "bin")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs PyTorch.*realjax\[torch\]"):
        CheckpointFiles.open(tmp_path / "bin")


def test_a_hub_model_comes_from_the_cache_when_whole_there_else_from_the_hub(single, tmp_path, monkeypatch):
    calls = []

    def snapshot(repo, *, local_files_only, allow_patterns):
        calls.append((local_files_only, "pytorch_model*.bin" in allow_patterns))
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
        return str(single)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve_model_path("owner/name") == single
    assert calls == [(True, False), (False, False)]


def test_a_hub_model_that_cannot_be_had_says_what_was_tried(monkeypatch):
    def snapshot(repo, *, local_files_only, allow_patterns):
        raise huggingface_hub.errors.LocalEntryNotFoundError("not cached" if local_files_only else "no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(ValueError, match="'owner/name' is neither.*cache: not cached; hub: no network"):
        resolve_model_path("owner/name")


def _dtype(directory) -> str:
    return CheckpointFiles.open(directory).dtype.name
