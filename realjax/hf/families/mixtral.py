"""Mixtral: experts in every layer, whose weights are renormalised; an optional window of all layers."""

from realjax.core.json_text import JsonObject
from realjax.hf.families.llama_like import read_pattern, read_sizes, write_sizes
from realjax.hf.families.moe_like import (
    count_experts,
    find_experts,
    list_experts,
    read_balance,
    spread_experts,
    write_balance,
)
from realjax.hf.families.tables import RULES
from realjax.hf.rules import Family
from realjax.models.config import AttentionConfig, ModelConfig, MoEConfig


def _config_from_hf(hf: JsonObject, is_critic: bool) -> ModelConfig:
    sizes, pattern = read_sizes(hf, is_critic), read_pattern(hf, AttentionConfig(), [hf.get("sliding_window")])
    experts = MoEConfig(
        num_experts=count_experts(hf),
        experts_per_token=hf.get("num_experts_per_tok", 2),
        expert_size=hf["intermediate_size"],
        renormalise=True,
        activation=pattern[0].feed_forward.activation,
        balance_coef=read_balance(hf),
    )
    return ModelConfig(
        family="mixtral",
        **sizes,
        max_positions=hf.get("max_position_embeddings", 4096 * 32),
        pattern=spread_experts(sizes["num_layers"], pattern, experts, [True] * sizes["num_layers"]),
    )


def _config_to_hf(config: ModelConfig) -> JsonObject:
    experts = find_experts(config)
    return {
        **write_sizes(config),
        **write_balance(experts),
        "intermediate_size": experts.expert_size,
        "sliding_window": config.pattern[0].mixer.window,
        "num_local_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
    }


FAMILY = Family(
    name="mixtral",
    published_as=("mixtral",),
    causal_class="MixtralForCausalLM",
    critic_class="MixtralForSequenceClassification",
    rules=(*RULES, *list_experts("block_sparse_moe", "w1", "w3", "w2")),
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    defaults={"rms_norm_eps": 1e-5, "rope_theta": 1e6},
)
