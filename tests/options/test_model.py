"""Precision and family of a model."""

from typing import get_args

import pytest

from realjax.hf.families import FAMILIES
from realjax.options.model import ModelClass, ModelFamily, ModelTrainEvalConfig
from realjax.options.parsing import parse_overrides
from realjax.options.supervised import SFTConfig


@pytest.mark.parametrize(
    ("bf16", "fp16", "dtype"),
    [
        (None, None, "auto"),
        (None, False, "auto"),
        (True, None, "bfloat16"),
        (True, False, "bfloat16"),
        (None, True, "bfloat16"),
        (False, True, "bfloat16"),
        (False, None, "float32"),
        (False, False, "float32"),
    ],
)
def test_dtype_follows_the_switches(bf16, fp16, dtype):
    assert ModelTrainEvalConfig(enable_bf16=bf16, enable_fp16=fp16).dtype == dtype


def test_two_half_precisions_are_refused():
    with pytest.raises(ValueError, match="enable_bf16: found True together with enable_fp16=True"):
        ModelTrainEvalConfig(enable_bf16=True, enable_fp16=True)


@pytest.mark.parametrize(
    "family", [ModelFamily(_class="llama", size=7), ModelFamily(_class="qwen3", size=70, is_critic=True)]
)
def test_one_word_form_is_an_inverse(family):
    word = f"{family._class}-{family.size}" + ("-critic" if family.is_critic else "")
    assert ModelFamily.from_text(word, "model.type") == family


def test_a_fresh_head_makes_a_critic():
    assert ModelTrainEvalConfig(init_critic_from_actor=True).is_critic
    assert ModelTrainEvalConfig(type=ModelFamily(is_critic=True)).is_critic
    assert not ModelTrainEvalConfig().is_critic


def test_the_kinds_that_can_be_declared_are_those_that_load():
    works = [name for family in FAMILIES.values() for name in family.published_as]
    assert sorted(get_args(ModelClass)) == sorted(works)
    with pytest.raises(ValueError, match="found 'bloom-1'; it needs .* with class one of llama, "):
        ModelFamily.from_text("bloom-1", "model.type")
    with pytest.raises(ValueError, match="model.type._class: found 'bloom'; it needs one of llama, "):
        parse_overrides(SFTConfig, ["model.type._class=bloom"])
