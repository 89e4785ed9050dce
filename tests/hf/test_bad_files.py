"""Whatever is wrong with a file that a user gives: its reader raises one ValueError that names the file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from realjax.apps.recipe import read_config
from realjax.core.json_text import parse_json
from realjax.data.jsonl import load_rows
from realjax.experiments.common import load_tokenizer
from realjax.hf.files import CheckpointFiles, read_json, resolve_model_path
from realjax.hf.generation import load_eos_ids
from realjax.hf.load import load_config
from realjax.record.metrics import read_metrics
from tests.given.checkpoints import make_bin, write_llama

ROW = {"id": "a", "prompt": "p", "step": 1}
HUGE = '{"ignored": ' + "1" * 4301 + "}"
DEEP = '{"ignored": ' + "[" * 100_000 + "]" * 100_000 + "}"

# What stands in a file instead of what should.
CONTENTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "pointer": lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n",
    "half": lambda whole: whole[: 2 * len(whole) // 3],
    "zeros": lambda whole: bytes(len(whole)),
    "bytes": lambda whole: bytes(range(256)),
    "huge integer": lambda whole: HUGE.encode(),
    "deep": lambda whole: DEEP.encode(),
    "a number": lambda whole: b"7",
    "a text": lambda whole: b'"text"',
    "a list": lambda whole: b"[[]]",
    "a wrong list": lambda whole: b'[{"a": [null]}]',
    "null": lambda whole: b"null",
    "another encoding": lambda whole: '{"é": 1}'.encode("utf-16"),
}


def rewrite(file: Path, damage: Callable[[bytes], bytes]) -> Path:
    file.write_bytes(damage(file.read_bytes()))
    return file


@pytest.fixture
def model(tmp_path):
    directory = write_llama(tmp_path / "llama")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 3]}))
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "shard.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def whole_rows(file: Path) -> Path:
    rows = [ROW, {**ROW, "id": "b"}]
    whole = json.dumps(rows) if file.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    file.write_text(whole)
    return file


# Each reads a file of the model's directory.
MODEL_FILES: dict[str, Callable[[Path], object]] = {
    "config.json": load_config,
    "generation_config.json": lambda model: load_eos_ids(model, load_tokenizer(model)),
    "model.safetensors": CheckpointFiles.open,
    "model.safetensors.index.json": lambda model: CheckpointFiles.open(without_single(model)),
    "tokenizer.json": load_tokenizer,
    "tokenizer_config.json": load_tokenizer,
}


def without_single(model: Path) -> Path:
    (model / "model.safetensors").unlink()
    return model


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", MODEL_FILES)
def test_a_file_of_a_model(name, content, model):
    rewrite(model / name, CONTENTS[content])
    with pytest.raises(ValueError, match=f"{model}.*"):
        MODEL_FILES[name](model)


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_file_of_rows(name, content, tmp_path):
    file = rewrite(whole_rows(tmp_path / name), CONTENTS[content])
    with pytest.raises(ValueError, match=f"^dataset.path: '{file}'"):
        load_rows(str(file), {"prompt": str}, "dataset.path")


@pytest.mark.parametrize("content", [name for name in CONTENTS if name not in ("empty", "half")])
def test_what_an_earlier_run_left(content, tmp_path):
    """A last line may be torn; whatever stands before it has to be whole."""
    damaged = CONTENTS[content](b"x" * 20).replace(b"\n", b" ") + b"\n"
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(damaged + json.dumps(ROW).encode() + b"\n")
    with pytest.raises(ValueError, match=f"'{file}' line 1: "):
        read_metrics(file)


@pytest.mark.parametrize(
    "text", ["get_config = 3 +", "import no_such_module", "def get_config(): return 1 / 0", "exit()"]
)
def test_a_recipe(text, tmp_path):
    file = tmp_path / "recipe.py"
    file.write_text(text)
    with pytest.raises(ValueError, match="^--config: "):
        read_config(["main", f"--config={file}"])


@pytest.fixture
def bin_model(model, tmp_path):
    pytest.importorskip("torch")
    (model / "model.safetensors.index.json").unlink()
    return make_bin(model, tmp_path / "bin")


@pytest.mark.parametrize("content", [*CONTENTS, "a number of torch's", "a nested state", "names that are numbers"])
def test_a_bin_file(content, bin_model):
    import torch

    file = bin_model / "pytorch_model.bin"
    state = torch.load(file)
    odd = {"a number of torch's": 3, "a nested state": {"state_dict": state}, "names that are numbers": {0: 1}}
    if content in odd:
        torch.save(odd[content], file)
    else:
        rewrite(file, CONTENTS[content])
    with pytest.raises(ValueError, match=f"checkpoint: '{file}' (is not a whole|holds) .*; (download|save)"):
        CheckpointFiles.open(bin_model)


def test_a_step_counter_beside_the_tensors_is_passed_over_as_in_transformers(bin_model):
    import torch
    from transformers import AutoModelForCausalLM

    file = bin_model / "pytorch_model.bin"
    state = torch.load(file)
    torch.save({**state, "step": 7}, file)
    assert set(CheckpointFiles.open(bin_model).tensors) == set(state)
    theirs = AutoModelForCausalLM.from_pretrained(bin_model).state_dict()
    assert all(torch.equal(theirs[name], x) for name, x in state.items())


WRONG_VALUES = {
    "vocab_size": ["32000", True, 0, -5, 1.5, None, 2**31, [1]],
    "num_hidden_layers": ["2", False, 0],
    "num_key_value_heads": ["2", 0],
    "head_dim": ["8", 0, 2.0],
    "max_position_embeddings": [None, "128"],
    "rms_norm_eps": ["1e-6", None, True, 0, -1e-6],
    "rope_theta": ["1e4", 0],
    "tie_word_embeddings": ["false", 1, None],
    "hidden_act": [None, 3, ["silu"]],
    "architectures": ["LlamaForCausalLM", [3]],
    "rope_scaling": [[1], "linear", {"rope_type": "linear", "factor": "2"}, {"rope_type": 3}, {"factor": None}],
    "id2label": [["a"]],
    "model_type": [7],
}


@pytest.mark.parametrize("key", WRONG_VALUES)
def test_a_value_of_the_wrong_type_in_a_config(key, model):
    file = model / "config.json"
    config = json.loads(file.read_text())
    for value in WRONG_VALUES[key]:
        file.write_text(json.dumps(config | {key: value}))
        with pytest.raises(ValueError, match=rf"^{file}: {key}\b.*(; it must be|use the config.json)"):
            load_config(model)


def test_null_is_the_default_where_writers_mean_that(model):
    file = model / "config.json"
    config = json.loads(file.read_text())
    expected = load_config(model)
    nulls = dict.fromkeys(("head_dim", "rope_scaling", "rope_parameters", "sliding_window"))
    file.write_text(json.dumps(config | nulls))
    assert load_config(model) == expected


@pytest.mark.parametrize("name", ["config.json", "rows.jsonl", "model.safetensors"])
def test_a_directory_in_the_place_of_a_file(name, model):
    shutil.rmtree(model / name, ignore_errors=True)
    (model / name).unlink(missing_ok=True)
    (model / name).mkdir()
    with pytest.raises(ValueError, match=str(model)):
        if name == "rows.jsonl":
            load_rows(str(model / name), {"prompt": str}, "dataset.path")
        elif name == "config.json":
            resolve_model_path(model)
        else:
            CheckpointFiles.open(model)
    with pytest.raises(ValueError, match=str(model)):
        read_json(model / name, "model path")


def test_an_error_of_json_says_where():
    for raw, message in {
        b'{"a": 1,\n "b": }': r"malformed JSON \(.* at line 2 column 7\)",
        b"{": r"malformed JSON \(.* at column 2\)",
        b'[1,\n"\xff"]': r"not UTF-8 text \(byte 0xff on line 2\)",
        b"[1,\n\n" + b"7" * 5000 + b"]": r"an integer of more than 4300 digits on line 3\)",
        DEEP.encode(): "inside each other",
    }.items():
        with pytest.raises(ValueError, match=message):
            parse_json(raw)
