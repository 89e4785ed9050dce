"""Qwen3 (dense): a norm over each head of q and k, a head size of its own, optional sliding windows."""

from realjax.core.json_text import JsonObject
from realjax.hf.families.llama_like import (
    read_norm,
    read_pattern,
    read_sizes,
    read_windows,
    write_sizes,
    write_windows,
)
from realjax.hf.families.tables import RULES
from realjax.hf.rules import Family
from realjax.models.config import AttentionConfig, ModelConfig


def _config_from_hf(hf: JsonObject, is_critic: bool) -> ModelConfig:
    bias = bool(hf.get("attention_bias", False))
    if (head_dim := hf["head_dim"]) is None:  # not hidden_size over heads
        raise ValueError("head_dim is null; a Qwen3 config needs it (128 in the published ones)")
    sizes = {**read_sizes(hf, is_critic), "head_dim": head_dim}
    mixer = AttentionConfig(qkv_bias=bias, o_bias=bias, qk_norm=read_norm(hf))
    return ModelConfig(
        family="qwen3",
        **sizes,
        max_positions=hf["max_position_embeddings"],
        pattern=read_pattern(hf, mixer, read_windows(hf)),
    )


def _config_to_hf(config: ModelConfig) -> JsonObject:
    return {**write_sizes(config), **write_windows(config), "attention_bias": config.pattern[0].mixer.qkv_bias}


FAMILY = Family(
    name="qwen3",
    published_as=("qwen3",),
    causal_class="Qwen3ForCausalLM",
    critic_class="Qwen3ForSequenceClassification",
    rules=RULES,
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    defaults={"max_position_embeddings": 32768, "head_dim": 128},
)
