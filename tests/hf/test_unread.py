"""What a config.json asks for is computed or refused, for every family."""

import dataclasses
from typing import Any

import pytest
import transformers

from realjax.hf.families import FAMILIES, config_from_hf
from realjax.hf.families.unread import asks
from tests.given.models import FIRST_KINDS, KINDS, OF_EXPERTS, SIZES

# What some decoder of transformers computes by such keys.
ASKED: list[dict[str, Any]] = [
    {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
    {"attention_window_size": 8},
    {"attention_chunk_size": 8},
    {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8, "use_sliding_window": True},
    {"layer_types": ["linear_attention"] * 4},
    {"attn_logit_softcapping": 40.0},
    {"final_logit_softcapping": 20.0},
    {"partial_rotary_factor": 0.25},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}},
    {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}},
    {"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [1, 1, 2]}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "llama_4_scaling_beta": 0.1}},
    {"no_rope_layers": [1, 0, 1, 0]},
    {"rope_interleave": True},
    {"rope_local_base_freq": 1e3},
    {"attention_multiplier": 0.1},
    {"embedding_multiplier": 12.0},
    {"residual_multiplier": 0.2},
    {"logits_scaling": 8.0},
    {"logit_scale": 0.0625},
    {"query_pre_attn_scalar": 144},
    {"attn_temperature_tuning": True},
    {"scale_attn_by_inverse_layer_idx": True},
    {"clip_qkv": 8.0},
    {"use_qk_norm": True},
    {"use_parallel_residual": True},
    {"alibi": True},
    {"attention_bias": True},
    {"mlp_bias": True},
    {"lm_head_bias": True},
    {"use_bidirectional_attention": True},
    {"hidden_act": "relu2"},
    {"num_local_experts": 8, "n_shared_experts": 1},
]


NEEDED = {
    model_type: {key: value for key, value in keys.items() if key in OF_EXPERTS}
    for model_type, keys in (KINDS[kind] for kind in FIRST_KINDS)
}


def read(family: str, **keys: Any):
    return config_from_hf({"model_type": family, **SIZES, **NEEDED[family], **keys}, "config.json")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keys", ASKED, ids=lambda keys: ",".join(keys))
def test_what_is_asked_for_is_computed_or_refused(family, keys):
    # By default some have what others only have where they are asked for it.
    plain = {key: False for key, value in keys.items() if value is True}
    try:
        assert read(family, **keys) != read(family, **plain)
    except ValueError as error:
        assert str(error).startswith("config.json: ")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_asks_for_nothing_is_read(family):
    nothing = {"attn_logit_softcapping": None, "clip_qkv": None, "layer_types": ["full_attention"] * 4}
    ones = {"alibi": False, "logit_scale": 1.0, "use_qk_norm": False, "lm_head_bias": False, "rope_interleave": False}
    house = {"house": "key", "attention_dropout": 0.1, "initializer_factor": 0.5, "_attn_implementation": "eager"}
    nothing = {key: value for key, value in nothing.items() if key not in FAMILIES[family].defaults}  # gemma2's caps
    assert read(family, **nothing, **ones, **house) == read(family, layer_types=["full_attention"] * 4)


# Fields of transformers' config classes that change nothing of what a trained model computes, or not alone.
OF_NO_NUMBER = {"use_cache", "pretraining_tp", "initializer_range", "attention_dropout", "resid_pdrop", "embd_pdrop"}
OF_NO_NUMBER |= {"attn_pdrop", "summary_type", "summary_use_proj", "summary_proj_to_labels", "summary_first_dropout"}
OF_NO_NUMBER |= {"output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "num_mtp_layers"}
NOT_ALONE = {"rope_parameters", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}
NOT_ALONE |= {"original_max_position_embeddings", "no_rope_layers"}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_key_of_a_familys_own_is_left_out(family):
    """Each of them, with another value, makes another model or is refused."""
    own = dataclasses.fields(type(transformers.AutoConfig.for_model(family)))
    of_all = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    for field in own:
        if field.name in of_all | OF_NO_NUMBER | NOT_ALONE or field.name.endswith("token_id"):
            continue
        try:
            other = read(family, **{field.name: change(field.name, field.default)})
        except ValueError:
            continue
        assert other != read(family, **{field.name: field.default}), field.name


def change(key: str, default: Any) -> Any:
    """Returns another value than the default."""
    if isinstance(default, bool):
        return not default
    if isinstance(default, int | float):
        return default * 2
    return "silu" if default == "gelu_pytorch_tanh" else "gelu" if key == "hidden_act" else 16


# What published files say beside their sizes: a model that is read must not be refused for a word in a key.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "SmolLM2": ("llama", {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"a": "b"}}),
    "DeepSeek Coder": ("llama", {"rope_scaling": {"factor": 4.0, "type": "linear"}, "rope_theta": 1e5}),
    "R1 Distill": ("qwen2", {"max_window_layers": 21, "sliding_window": 4096, "use_mrope": False}),
    "Qwen3": ("qwen3", {"max_window_layers": 36, "sliding_window": None, "use_sliding_window": False}),
    "OLMo 2": ("olmo2", {"attention_bias": False, "rope_scaling": None, "rope_theta": 500000}),
    "Granite 3": ("granite", {"attention_multiplier": 0.0156, "embedding_multiplier": 12.0, "logits_scaling": 8.0}),
    "Phi-3 mini": ("phi3", {"original_max_position_embeddings": 4096, "rope_scaling": None, "sliding_window": 2047}),
    "Phi-4 mini": (
        "phi3",
        {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False, "embd_pdrop": 0.0}
        | {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 32, "sliding_window": 262144}
        | {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}},
    ),
    "SmolLM3": (
        "smollm3",
        {"layer_types": ["full_attention"] * 4, "max_window_layers": 28, "no_rope_layer_interval": 4}
        | {"no_rope_layers": [1, 1, 1, 0], "pretraining_tp": 2, "sliding_window": None, "use_sliding_window": False},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_published_is_read(name):
    family, keys = PUBLISHED[name]
    assert read(family, **keys).family == family


@pytest.mark.parametrize(
    "key",
    [
        "tie_word_embeddings",
        "num_attention_heads",
        "attention_probs_dropout_prob",
        "chunk_size_feed_forward",
        "output_router_logits",
        "max_position",
    ],
)
def test_some_keys_only_look_as_if_they_asked(key):
    assert not asks(key, 7)
