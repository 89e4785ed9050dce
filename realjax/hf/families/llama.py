"""Llama, and what is published in its form (CodeLlama, DeepSeek LLM, SmolLM2)."""

from realjax.core.json_text import JsonObject
from realjax.hf.families.llama_like import read_pattern, read_sizes, write_sizes
from realjax.hf.families.tables import RULES
from realjax.hf.rules import Family
from realjax.models.config import AttentionConfig, ModelConfig


def _config_from_hf(hf: JsonObject, is_critic: bool) -> ModelConfig:
    bias = bool(hf.get("attention_bias", False))  # one switch for q, k, v and o
    return ModelConfig(
        family="llama",
        **read_sizes(hf, is_critic),
        max_positions=hf["max_position_embeddings"],
        pattern=read_pattern(hf, AttentionConfig(qkv_bias=bias, o_bias=bias), mlp_bias=bool(hf.get("mlp_bias", False))),
    )


def _config_to_hf(config: ModelConfig) -> JsonObject:
    kind = config.pattern[0]
    return {**write_sizes(config), "attention_bias": kind.mixer.qkv_bias, "mlp_bias": kind.feed_forward.bias}


FAMILY = Family(
    name="llama",
    published_as=("llama", "codellama", "deepseek"),
    causal_class="LlamaForCausalLM",
    critic_class="LlamaForSequenceClassification",
    rules=RULES,
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    defaults={"max_position_embeddings": 2048},
)
