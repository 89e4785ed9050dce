"""Gemma 3: Gemma 2 with norms of q and k for softcaps, and another rotary embedding where layers have a window.

A `Gemma3ForConditionalGeneration` is read as its text model: what it has for images is left out, also of exports.
"""

from dataclasses import replace

from realjax.core.json_text import JsonObject
from realjax.hf.families.gemma import read_model
from realjax.hf.families.gemma2 import DEFAULTS, RULES, read_pattern, write_pattern
from realjax.hf.families.llama_like import FULL, SLIDING, read_norm
from realjax.hf.families.rope import read_rope, write_rope
from realjax.hf.rules import Family
from realjax.models.config import ModelConfig, RopeConfig

# The text part of a larger model's config.json says little beyond these.
_SIZES = {"vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 131_072}


def _read_ropes(hf: JsonObject) -> dict[str, RopeConfig]:
    """Returns those of layers with and without a window; in transformers 4's spelling only the latter can be scaled."""
    if not (hf.get("rope_parameters") or {}).keys() <= {FULL, SLIDING}:
        raise ValueError(f"rope_parameters {hf['rope_parameters']}; it needs the keys {FULL} and {SLIDING}")
    by_kind, scaling = hf.get("rope_parameters") or {}, {FULL: hf.get("rope_scaling") or {}, SLIDING: {}}
    thetas = {FULL: hf.get("rope_theta", 1e6), SLIDING: hf.get("rope_local_base_freq", 1e4)}
    given = {
        kind: {"rope_theta": theta, **(by_kind.get(kind) or {}), **scaling[kind]} for kind, theta in thetas.items()
    }
    return {kind: read_rope(hf, own) for kind, own in given.items()}


def _config_from_hf(hf: JsonObject, is_critic: bool) -> ModelConfig:
    if hf.get("attn_logit_softcapping") is not None:
        raise ValueError("attn_logit_softcapping is not null; transformers does not cap the scores of a Gemma 3 either")
    norm = replace(read_norm(hf), one_plus=True)
    every = hf.get("sliding_window_pattern", hf.get("_sliding_window_pattern", 6))
    pattern = read_pattern(hf, every, _read_ropes(hf), qk_norm=norm)
    cap = hf.get("final_logit_softcapping")
    return ModelConfig(family="gemma3_text", **read_model(hf, is_critic), pattern=pattern, logit_softcap=cap)


def _config_to_hf(config: ModelConfig) -> JsonObject:
    ropes = {name: kind.mixer.rope for name, kind in config.kinds.items()}
    full, sliding = ropes.get("full", RopeConfig(theta=1e6)), ropes.get("sliding") or RopeConfig()
    return {**write_pattern(config), **write_rope(full), "rope_local_base_freq": sliding.theta}


FAMILY = Family(
    name="gemma3_text",
    published_as=("gemma3",),
    causal_class="Gemma3ForCausalLM",
    critic_class="Gemma3TextForSequenceClassification",
    outer_classes=("Gemma3ForConditionalGeneration", "Gemma3ForSequenceClassification"),
    rules=RULES,
    defaults=DEFAULTS | _SIZES,
    spellings={
        "model.language_model.": "model.",
        "language_model.model.": "model.",
        "language_model.lm_head.": "lm_head.",
        **dict.fromkeys(("vision_tower.", "multi_modal_projector.")),
        **dict.fromkeys(("model.vision_tower.", "model.multi_modal_projector.")),
    },
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
)
