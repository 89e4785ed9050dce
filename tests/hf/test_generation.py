"""Which tokens end an answer: what the checkpoint's files and its tokenizer say."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from realjax.hf.generation import load_eos_ids


def find(directory, own, **files):
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    tokenizer: Any = SimpleNamespace(eos_token_id=own)
    return load_eos_ids(directory, tokenizer)


@pytest.mark.parametrize(
    ("own", "generation", "config", "expected"),
    [
        (2, {"eos_token_id": [7, 5]}, {"eos_token_id": 3}, (2, 5, 7)),
        (2, {"eos_token_id": 2}, {"eos_token_id": 3}, (2,)),
        (2, {"eos_token_id": 0}, {"eos_token_id": 3}, (0, 2)),
        (2, {}, {"eos_token_id": 3}, (2, 3)),
        (2, {}, {}, (2,)),
        (None, {}, {"eos_token_id": [4]}, (4,)),
    ],
)
def test_generation_config_comes_before_config_and_the_tokenizers_own_is_added(
    tmp_path, own, generation, config, expected
):
    assert find(tmp_path, own, generation_config=generation, config=config) == expected


def test_a_directory_without_generation_config(tmp_path):
    assert find(tmp_path, None, config={"eos_token_id": 9}) == (9,)


def test_no_end_of_text_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="names no end-of-text token, so no answer could end; set eos_token_id in"):
        find(tmp_path, None, config={})


@pytest.mark.parametrize("wrong", ["</s>", [1, "x"], -1, 2.5])
def test_anything_but_ids_is_an_error(tmp_path, wrong):
    with pytest.raises(ValueError, match="eos_token_id is .*; it must be a token's id, or a list of ids"):
        find(tmp_path, 1, config={"eos_token_id": wrong})
