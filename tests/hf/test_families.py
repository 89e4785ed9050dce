import dataclasses
import json

import pytest
from transformers import AutoConfig

from realjax.hf.families import FAMILIES, config_from_hf, config_to_hf
from realjax.hf.families.llama_like import ACTIVATIONS, HF_ACTIVATIONS
from realjax.hf.load import load_config
from realjax.models.config import RopeConfig
from tests.given.checkpoints import make_checkpoint
from tests.given.models import KINDS, LLAMA3_ROPE, SIZES

LLAMA = {"architectures": ["LlamaForCausalLM"], **SIZES}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], **SIZES}


def read(hf):
    return config_from_hf(hf, "config.json")


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_survives_the_round_trip_and_transformers_reads_what_we_write_as_its_own(kind, tmp_path):
    theirs = make_checkpoint(tmp_path / "theirs", kind)
    config = load_config(theirs)
    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "config.json").write_text(json.dumps(config_to_hf(config)))
    assert load_config(ours) == config
    a, b = AutoConfig.from_pretrained(theirs).to_dict(), AutoConfig.from_pretrained(ours).to_dict()
    # One rotary embedding has several spellings; `test_save` compares what transformers computes by them.
    told_apart = {"dtype", "transformers_version", "_name_or_path", "pad_token_id", "head_dim", "rope_parameters"}
    if config.pattern[0].mixer.window is None:
        told_apart |= {"sliding_window", "max_window_layers"}
    told_apart |= a.keys() - AutoConfig.for_model(a["model_type"]).to_dict().keys()  # names of sizes that it has not
    assert {k: v for k, v in a.items() if k not in told_apart} == {k: v for k, v in b.items() if k not in told_apart}


@pytest.mark.parametrize("hf", [LLAMA, QWEN2])
def test_old_and_new_spellings_of_rotary_embedding_read_alike(hf):
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    old = read({**hf, "rope_theta": 5e5, "rope_scaling": scaling})
    assert old == read({**hf, "rope_parameters": LLAMA3_ROPE})
    assert old.ropes[0].scaling == "llama3" and old.ropes[0].original_max_positions == 32
    for kind in ("linear", "dynamic"):
        scaled = read({**hf, "rope_theta": 1e4, "rope_scaling": {"type": kind, "factor": 2.0}})
        assert scaled == read({**hf, "rope_parameters": {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4}})
        assert scaled.ropes == (RopeConfig(theta=1e4, scaling=kind, factor=2.0),)


def test_absent_keys_have_the_defaults_of_transformers():
    bare = {key: value for key, value in LLAMA.items() if key not in ("num_key_value_heads", "max_position_embeddings")}
    config = read(bare)
    assert (config.num_kv_heads, config.head_dim, config.max_positions) == (4, 8, 2048)
    assert (config.norm.eps, config.ropes[0].theta, config.tied) == (1e-6, 10000.0, False)
    assert read({"model_type": "qwen3", **SIZES}).head_dim == 128


def test_activations_are_inverse():
    assert all(ACTIVATIONS[HF_ACTIVATIONS[name]] == name for name in set(ACTIVATIONS.values()))


@pytest.mark.parametrize(
    "window, expected",
    [
        ({"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}, [None]),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, [8]),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 28}, [None]),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}, [None, None, None, 8]),
        ({"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention"] * 4}, [8]),
        (
            {"use_sliding_window": True, "sliding_window": 8}
            | {"layer_types": ["sliding_attention", "full_attention"] * 2},
            [8, None],
        ),
    ],
)
def test_a_sliding_window_is_read_as_transformers_applies_it(window, expected):
    config = read({**QWEN2, **window})
    assert [kind.mixer.window for kind in config.pattern] == expected
    assert read(config_to_hf(config)) == config


def test_a_classifier_of_one_label_is_a_critic_and_never_tied():
    hf = {**LLAMA, "architectures": ["LlamaForSequenceClassification"], "tie_word_embeddings": True}
    critic = read({**hf, "id2label": {"0": "LABEL_0"}})
    assert critic.is_critic and not critic.tied
    assert read(config_to_hf(critic)) == critic
    with pytest.raises(ValueError, match="with 2 labels; a critic has one"):
        read(hf)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"architectures": ["FalconForCausalLM"]},
            "architecture 'FalconForCausalLM' is not supported; supported: Llama",
        ),
        ({"architectures": None}, "architecture 'None' is not supported"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ({"quantization_config": {}}, "quantised"),
        ({"rope_scaling": {"type": "proportional", "factor": 2.0}}, "'proportional' is not supported .*remove it from"),
        ({"rope_scaling": {"rope_type": "dynamic", "alpha": 2.0}}, r"'dynamic' with \['alpha'\] is not supported"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rotary embedding .* is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "no key 'factor'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, and in this family whole heads turn"),
        ({"sliding_window": 8}, "sliding_window is 8, which this family does not compute"),
        ({"num_key_value_heads": 3}, "config.json: model config: 4 query heads do not divide"),
    ],
)
def test_what_cannot_be_computed_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        read({**LLAMA, **change})


def test_a_missing_size_and_layers_of_unknown_types_are_refused():
    with pytest.raises(ValueError, match="config.json: no key 'hidden_size'; a LlamaForCausalLM config needs it"):
        read({key: value for key, value in LLAMA.items() if key != "hidden_size"})
    for types in (["full_attention"] * 3, ["full_attention"] * 3 + ["linear_attention"]):
        with pytest.raises(ValueError, match="layer_types .* for 4 layers; it needs one of full_attention and"):
            read({**QWEN2, "use_sliding_window": True, "sliding_window": 8, "layer_types": types})


@pytest.mark.parametrize(
    "family, change, message",
    [
        ("llama", {"window": 8}, "LlamaForCausalLM cannot have window=8"),
        ("qwen2", {"o_bias": True}, "Qwen2ForCausalLM cannot have o_bias=True"),
        ("qwen3", {"qk_norm": None}, "Qwen3ForCausalLM cannot have qk_norm=None"),
        ("bloom", {}, "model family 'bloom' is not supported; supported: llama, "),
    ],
)
def test_a_config_that_its_family_cannot_express_is_not_written(family, change, message):
    base = read({**LLAMA, "architectures": None, "model_type": family if family in FAMILIES else "llama"})
    (kind,) = base.pattern
    changed = dataclasses.replace(kind, mixer=dataclasses.replace(kind.mixer, **change))
    with pytest.raises(ValueError, match=message):
        config_to_hf(dataclasses.replace(base, family=family, pattern=(changed,)))
