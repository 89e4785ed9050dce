"""Qwen3 (dense): a norm over each head of q and k, a head size of its own, an optional sliding window."""

from realjax.core.json_text import JsonObject
from realjax.hf.families.llama_like import RULES, read_sizes, read_window, write_sizes, write_window
from realjax.hf.rules import Family
from realjax.models.config import ModelConfig


def _config_from_hf(hf: JsonObject, is_critic: bool) -> ModelConfig:
    bias = bool(hf.get("attention_bias", False))
    if (head_dim := hf.get("head_dim", 128)) is None:  # not hidden_size over heads
        raise ValueError("head_dim is null; a Qwen3 config needs it (128 in the published ones)")
    sizes = {**read_sizes(hf, is_critic), "head_dim": head_dim}
    return ModelConfig(
        family="qwen3",
        **sizes,
        max_positions=hf.get("max_position_embeddings", 32768),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
        sliding_window=read_window(hf),
    )


def _config_to_hf(config: ModelConfig) -> JsonObject:
    return {**write_sizes(config), **write_window(config), "attention_bias": config.qkv_bias}


FAMILY = Family(
    name="qwen3",
    published_as=("qwen3",),
    causal_class="Qwen3ForCausalLM",
    critic_class="Qwen3ForSequenceClassification",
    rules=RULES,
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
)
