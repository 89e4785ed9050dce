"""Qwen3 with experts: Qwen3's attention, and a router that takes the softmax before it chooses."""

from realjax.core.json_text import JsonObject
from realjax.hf.families.llama_like import read_norm, read_pattern, read_sizes, write_sizes
from realjax.hf.families.moe_like import (
    EXPERTS,
    count_experts,
    find_experts,
    read_balance,
    read_sparse_layers,
    spread_experts,
    write_balance,
    write_sparse_layers,
)
from realjax.hf.families.tables import RULES
from realjax.hf.rules import Family
from realjax.models.config import AttentionConfig, ModelConfig, MoEConfig


def _config_from_hf(hf: JsonObject, is_critic: bool) -> ModelConfig:
    bias, sizes = bool(hf.get("attention_bias", False)), read_sizes(hf, is_critic)
    mixer = AttentionConfig(qkv_bias=bias, o_bias=bias, qk_norm=read_norm(hf))
    # A window, if any, is that of all layers.
    window = hf.get("sliding_window", 4096)
    window = window if hf.get("use_sliding_window", False) else None
    pattern = read_pattern(hf, mixer, [window])
    experts = MoEConfig(
        num_experts=count_experts(hf),
        experts_per_token=hf.get("num_experts_per_tok", 8),
        expert_size=hf["moe_intermediate_size"],
        renormalise=bool(hf.get("norm_topk_prob", False)),
        activation=pattern[0].feed_forward.activation,
        balance_coef=read_balance(hf),
    )
    return ModelConfig(
        family="qwen3_moe",
        **sizes,
        max_positions=hf.get("max_position_embeddings", 32768),
        pattern=spread_experts(sizes["num_layers"], pattern, experts, read_sparse_layers(hf)),
    )


def _config_to_hf(config: ModelConfig) -> JsonObject:
    experts, mixer = find_experts(config), config.pattern[0].mixer
    return {
        **write_sizes(config),
        **write_balance(experts),
        **write_sparse_layers(config),
        "attention_bias": mixer.qkv_bias,
        "use_sliding_window": mixer.window is not None,
        "sliding_window": mixer.window,
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "moe_intermediate_size": experts.expert_size,
        "norm_topk_prob": experts.renormalise,
    }


FAMILY = Family(
    name="qwen3_moe",
    published_as=("qwen3_moe",),
    causal_class="Qwen3MoeForCausalLM",
    critic_class="Qwen3MoeForSequenceClassification",
    rules=(*RULES, *EXPERTS),
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
)
