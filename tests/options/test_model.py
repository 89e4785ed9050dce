"""Precision and family of a model."""

import pytest

from realjax.options.model import ModelFamily, ModelTrainEvalConfig


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


@pytest.mark.parametrize("family", [ModelFamily(size=7), ModelFamily(_class="qwen3", size=70, is_critic=True)])
def test_one_word_form_is_an_inverse(family):
    word = f"{family._class}-{family.size}" + ("-critic" if family.is_critic else "")
    assert ModelFamily.from_text(word, "model.type") == family


def test_a_fresh_head_makes_a_critic():
    assert ModelTrainEvalConfig(init_critic_from_actor=True).is_critic
    assert ModelTrainEvalConfig(type=ModelFamily(is_critic=True)).is_critic
    assert not ModelTrainEvalConfig().is_critic
