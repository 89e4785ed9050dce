"""OLMo 2: norms behind attention and feed-forward instead of before, and one over all heads of q, and all of k."""

from collections.abc import Iterable
from dataclasses import replace

from realjax.core.json_text import JsonObject
from realjax.hf.families.llama_like import read_norm, read_pattern, read_sizes, write_sizes
from realjax.hf.families.tables import LAYER, change
from realjax.hf.rules import Family, Rule
from realjax.models.config import AttentionConfig, LayerKind, ModelConfig

RULES = change(
    Rule("layers/attn_post_norm/scale", LAYER + "post_attention_layernorm.weight", "D -> D"),
    Rule("layers/mlp_post_norm/scale", LAYER + "post_feedforward_layernorm.weight", "D -> D"),
    Rule("layers/attn/q_norm/scale", LAYER + "self_attn.q_norm.weight", "(N H) -> N H"),
    Rule("layers/attn/k_norm/scale", LAYER + "self_attn.k_norm.weight", "(K H) -> K H"),
)
DEFAULTS: JsonObject = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5}


def read_mixer(hf: JsonObject) -> AttentionConfig:
    """Returns how OLMo's layers attend, windows and rotary embedding apart."""
    bias = bool(hf.get("attention_bias", False))
    return AttentionConfig(qkv_bias=bias, o_bias=bias, qk_norm=read_norm(hf), qk_norm_whole=True)


def norm_after(kinds: Iterable[LayerKind]) -> tuple[LayerKind, ...]:
    """Returns the kinds with their norms behind attention and feed-forward."""
    before = {"attn_norm": None, "mlp_norm": None}
    return tuple(replace(kind, **before, attn_post_norm=kind.attn_norm, mlp_post_norm=kind.mlp_norm) for kind in kinds)


def _config_from_hf(hf: JsonObject, is_critic: bool) -> ModelConfig:
    return ModelConfig(
        family="olmo2",
        **read_sizes(hf, is_critic),
        max_positions=hf["max_position_embeddings"],
        pattern=norm_after(read_pattern(hf, read_mixer(hf))),
    )


def _config_to_hf(config: ModelConfig) -> JsonObject:
    return {**write_sizes(config), "attention_bias": config.pattern[0].mixer.qkv_bias}


FAMILY = Family(
    name="olmo2",
    published_as=("olmo2",),
    causal_class="Olmo2ForCausalLM",
    critic_class="Olmo2ForSequenceClassification",
    rules=RULES,
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    defaults=DEFAULTS,
)
