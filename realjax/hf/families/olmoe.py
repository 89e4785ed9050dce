"""OLMoE: experts in every layer, and a norm over all heads of q, and all of k."""

from realjax.core.json_text import JsonObject
from realjax.hf.families.llama_like import read_norm, read_pattern, read_sizes, write_sizes
from realjax.hf.families.moe_like import (
    EXPERTS,
    count_experts,
    find_experts,
    read_balance,
    spread_experts,
    write_balance,
)
from realjax.hf.families.tables import LAYER, change
from realjax.hf.rules import Family, Rule
from realjax.models.config import AttentionConfig, ModelConfig, MoEConfig

RULES = change(
    *EXPERTS,
    Rule("layers/attn/q_norm/scale", LAYER + "self_attn.q_norm.weight", "(N H) -> N H"),
    Rule("layers/attn/k_norm/scale", LAYER + "self_attn.k_norm.weight", "(K H) -> K H"),
)


def _config_from_hf(hf: JsonObject, is_critic: bool) -> ModelConfig:
    sizes, bias = read_sizes(hf, is_critic), bool(hf.get("attention_bias", False))
    mixer = AttentionConfig(qkv_bias=bias, o_bias=bias, qk_norm=read_norm(hf), qk_norm_whole=True)
    pattern = read_pattern(hf, mixer)
    experts = MoEConfig(
        num_experts=count_experts(hf),
        experts_per_token=hf.get("num_experts_per_tok", 8),
        expert_size=hf["intermediate_size"],
        renormalise=bool(hf.get("norm_topk_prob", False)),
        activation=pattern[0].feed_forward.activation,
        balance_coef=read_balance(hf, 0.01),
    )
    return ModelConfig(
        family="olmoe",
        **sizes,
        max_positions=hf["max_position_embeddings"],
        pattern=spread_experts(sizes["num_layers"], pattern, experts, [True] * sizes["num_layers"]),
    )


def _config_to_hf(config: ModelConfig) -> JsonObject:
    experts = find_experts(config)
    return {
        **write_sizes(config),
        **write_balance(experts),
        "intermediate_size": experts.expert_size,
        "attention_bias": config.pattern[0].mixer.qkv_bias,
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "norm_topk_prob": experts.renormalise,
    }


FAMILY = Family(
    name="olmoe",
    published_as=("olmoe",),
    causal_class="OlmoeForCausalLM",
    critic_class="OlmoeForSequenceClassification",
    rules=RULES,
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
)
