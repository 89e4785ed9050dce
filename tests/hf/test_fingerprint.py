"""A model is the same wherever it lies, and another one when its tensors, its config or its tokenizer are."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from realjax.hf.fingerprint import fingerprint_model
from tests.given.checkpoints import edit_config, edit_tensors, write_llama


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "model")


def train(directory: Path) -> None:
    edit_tensors(directory, lambda tensors: {name: np.nextafter(x, 9) for name, x in tensors.items()})


def set_config(directory: Path) -> None:
    edit_config(directory, rope_theta=5.0)


def cut_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").write_text((directory / "tokenizer.json").read_text().replace("film", "flim"))


@pytest.mark.parametrize("change", [train, set_config, cut_tokenizer])
def test_a_copy_is_the_same_model_and_a_changed_one_another(change, model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "elsewhere" / "copy")
    assert fingerprint_model(copy) == fingerprint_model(model)
    change(copy)
    assert fingerprint_model(copy) != fingerprint_model(model)


def test_weights_of_a_model_from_scratch_do_not_count(model):
    before = fingerprint_model(model, has_weights=False)
    (model / "model.safetensors").unlink()
    assert fingerprint_model(model, has_weights=False) == before
