"""Granite: Llama's layers with a factor on embeddings, scores, what a layer adds, and logits."""

from dataclasses import replace

from realjax.core.json_text import JsonObject
from realjax.hf.families.llama_like import read_pattern, read_sizes, write_sizes
from realjax.hf.families.tables import RULES
from realjax.hf.rules import Family
from realjax.models.config import AttentionConfig, ModelConfig

DEFAULTS: JsonObject = {
    "max_position_embeddings": 2048,
    "attention_multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}


def read_granite(hf: JsonObject, is_critic: bool, mlp_bias: bool) -> ModelConfig:
    """Returns the dense model that a config.json describes, but for biases of feed-forwards."""
    bias = bool(hf.get("attention_bias", False))
    mixer = AttentionConfig(qkv_bias=bias, o_bias=bias, scale=float(hf["attention_multiplier"]))
    (kind,) = read_pattern(hf, mixer, mlp_bias=mlp_bias)
    embed_scale = float(hf["embedding_multiplier"])
    return ModelConfig(
        family="granite",
        **read_sizes(hf, is_critic),
        max_positions=hf["max_position_embeddings"],
        pattern=(replace(kind, residual_scale=float(hf["residual_multiplier"])),),
        embed_scale=None if embed_scale == 1 else embed_scale,
        logit_scale=1 / hf["logits_scaling"],
    )


def write_granite(config: ModelConfig) -> JsonObject:
    """Returns the keys of `read_granite`; its inverse."""
    kind = config.pattern[0]
    return {
        **write_sizes(config),
        "attention_bias": kind.mixer.qkv_bias,
        "attention_multiplier": kind.mixer.scale,
        "residual_multiplier": kind.residual_scale,
        "embedding_multiplier": 1.0 if config.embed_scale is None else config.embed_scale,
        "logits_scaling": 1 / config.logit_scale,
    }


FAMILY = Family(
    name="granite",
    published_as=("granite",),
    causal_class="GraniteForCausalLM",
    critic_class="GraniteForSequenceClassification",  # a name of ours
    rules=RULES,
    config_from_hf=lambda hf, is_critic: read_granite(hf, is_critic, bool(hf.get("mlp_bias", False))),
    config_to_hf=lambda config: {**write_granite(config), "mlp_bias": config.pattern[0].feed_forward.bias},
    defaults=DEFAULTS,
)
