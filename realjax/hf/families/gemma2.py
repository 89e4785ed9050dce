"""Gemma 2: norms before and after both parts of a layer, softcaps on scores and logits, every second layer a window."""

from collections.abc import Mapping
from dataclasses import replace

from realjax.core.json_text import JsonObject
from realjax.hf.families.gemma import DEFAULTS as GEMMA_DEFAULTS
from realjax.hf.families.gemma import learn_less_one, read_kind, read_model
from realjax.hf.families.llama_like import FULL, SLIDING, place_windows, write_sizes
from realjax.hf.families.rope import read_rope
from realjax.hf.families.tables import LAYER, change
from realjax.hf.rules import Family, Rule
from realjax.models.config import LayerKind, ModelConfig, RopeConfig

RULES = learn_less_one(
    change(
        Rule("layers/attn_post_norm/scale", LAYER + "post_attention_layernorm.weight", "D -> D"),
        Rule("layers/mlp_norm/scale", LAYER + "pre_feedforward_layernorm.weight", "D -> D"),
        Rule("layers/mlp_post_norm/scale", LAYER + "post_feedforward_layernorm.weight", "D -> D"),
    )
)
DEFAULTS = GEMMA_DEFAULTS | {"query_pre_attn_scalar": 256, "sliding_window": 4096}


def read_pattern(hf: JsonObject, every: int, ropes: Mapping[str, RopeConfig], **mixer: object) -> tuple[LayerKind, ...]:
    """Returns the layers as they repeat: those of `layer_types`, or a full one after `every` - 1 that have a window."""
    scalar, num_layers, window = hf["query_pre_attn_scalar"], hf["num_hidden_layers"], hf["sliding_window"]
    types = hf.get("layer_types") or [SLIDING if (i + 1) % every else FULL for i in range(num_layers)]
    if window is None and SLIDING in types:
        raise ValueError(f"sliding_window is null, and layer_types has {SLIDING}; it needs a number of tokens")
    kind = read_kind(hf, scale=None if scalar == hf["head_dim"] else scalar**-0.5, **mixer)
    kind = replace(kind, attn_post_norm=kind.attn_norm, mlp_post_norm=kind.mlp_norm)
    full = replace(kind, mixer=replace(kind.mixer, rope=ropes[FULL]))
    sliding = replace(kind, name="sliding", mixer=replace(kind.mixer, window=window, rope=ropes[SLIDING]))
    return tuple(sliding if window else full for window in place_windows(types, window, num_layers))


def write_pattern(config: ModelConfig) -> JsonObject:
    """Returns the config.json keys of sizes and of `read_pattern`."""
    hf, mixer, windows = write_sizes(config), config.pattern[0].mixer, [kind.mixer.window for kind in config.layers]
    return hf | {
        "hidden_activation": hf.pop("hidden_act"),
        "query_pre_attn_scalar": config.head_dim if mixer.scale is None else round(mixer.scale**-2),
        "attention_bias": mixer.qkv_bias,
        "sliding_window": max(filter(None, windows), default=4096),
        "layer_types": [FULL if window is None else SLIDING for window in windows],
        "final_logit_softcapping": config.logit_softcap,
    }


def _config_from_hf(hf: JsonObject, is_critic: bool) -> ModelConfig:
    pattern = read_pattern(hf, 2, dict.fromkeys((SLIDING, FULL), read_rope(hf)), softcap=hf["attn_logit_softcapping"])
    cap = hf["final_logit_softcapping"]
    return ModelConfig(family="gemma2", **read_model(hf, is_critic), pattern=pattern, logit_softcap=cap)


def _config_to_hf(config: ModelConfig) -> JsonObject:
    return write_pattern(config) | {"attn_logit_softcapping": config.pattern[0].mixer.softcap}


FAMILY = Family(
    name="gemma2",
    published_as=("gemma2",),
    causal_class="Gemma2ForCausalLM",
    critic_class="Gemma2ForSequenceClassification",
    rules=RULES,
    defaults=DEFAULTS | {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
)
