"""Qwen2 and Qwen2.5: always a bias on q, k and v, never on o; optional sliding windows."""

from realjax.core.json_text import JsonObject
from realjax.hf.families.llama_like import read_pattern, read_sizes, read_windows, write_sizes, write_windows
from realjax.hf.families.tables import RULES
from realjax.hf.rules import Family
from realjax.models.config import AttentionConfig, ModelConfig


def _config_from_hf(hf: JsonObject, is_critic: bool) -> ModelConfig:
    return ModelConfig(
        family="qwen2",
        **read_sizes(hf, is_critic),
        max_positions=hf["max_position_embeddings"],
        pattern=read_pattern(hf, AttentionConfig(qkv_bias=True), read_windows(hf)),
    )


def _config_to_hf(config: ModelConfig) -> JsonObject:
    return {**write_sizes(config), **write_windows(config)}


FAMILY = Family(
    name="qwen2",
    published_as=("qwen2",),
    causal_class="Qwen2ForCausalLM",
    critic_class="Qwen2ForSequenceClassification",
    rules=RULES,
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    defaults={"max_position_embeddings": 32768},
)
