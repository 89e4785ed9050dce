"""Mistral: Llama's layers without biases, all with a sliding window or none, and a head size of its own."""

from realjax.core.json_text import JsonObject
from realjax.hf.families.llama_like import read_pattern, read_sizes, write_sizes
from realjax.hf.families.tables import RULES
from realjax.hf.rules import Family
from realjax.models.config import AttentionConfig, ModelConfig


def _config_from_hf(hf: JsonObject, is_critic: bool) -> ModelConfig:
    return ModelConfig(
        family="mistral",
        **read_sizes(hf, is_critic),
        max_positions=hf["max_position_embeddings"],
        pattern=read_pattern(hf, AttentionConfig(), [hf["sliding_window"]]),
    )


def _config_to_hf(config: ModelConfig) -> JsonObject:
    return {**write_sizes(config), "sliding_window": config.pattern[0].mixer.window}


FAMILY = Family(
    name="mistral",
    published_as=("mistral",),
    causal_class="MistralForCausalLM",
    critic_class="MistralForSequenceClassification",
    rules=RULES,
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    defaults={"max_position_embeddings": 131072, "sliding_window": 4096},
)
