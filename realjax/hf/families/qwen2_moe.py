"""Qwen1.5 and Qwen2 with experts: a feed-forward that every token goes through beside them, weighed by a sigmoid."""

from realjax.core.json_text import JsonObject
from realjax.hf.families.llama_like import FULL, SLIDING, place_windows, read_pattern, read_sizes, write_sizes
from realjax.hf.families.moe_like import (
    EXPERTS,
    count_experts,
    find_experts,
    list_shared,
    read_balance,
    read_sparse_layers,
    spread_experts,
    write_balance,
    write_sparse_layers,
)
from realjax.hf.families.tables import RULES
from realjax.hf.rules import Family, Rule
from realjax.models.config import AttentionConfig, ModelConfig, MoEConfig

SHARED_GATE = Rule(
    "layers/mlp/shared/router/kernel", "model.layers.{layer}.mlp.shared_expert_gate.weight", "1 D -> D 1"
)


def _config_from_hf(hf: JsonObject, is_critic: bool) -> ModelConfig:
    sizes, first, window = read_sizes(hf, is_critic), hf.get("max_window_layers", 28), hf.get("sliding_window", 4096)
    # Without a list of types, every second of the first layers has the window.
    types = [FULL if i % 2 or i >= first else SLIDING for i in range(sizes["num_layers"])]
    types, has_window = hf.get("layer_types") or types, hf.get("use_sliding_window", False)
    windows = place_windows(types, window if has_window else None, sizes["num_layers"])
    pattern = read_pattern(hf, AttentionConfig(qkv_bias=bool(hf.get("qkv_bias", True))), windows)
    experts = MoEConfig(
        num_experts=count_experts(hf),
        experts_per_token=hf.get("num_experts_per_tok", 4),
        expert_size=hf["moe_intermediate_size"],
        renormalise=bool(hf.get("norm_topk_prob", False)),
        activation=pattern[0].feed_forward.activation,
        shared_size=hf["shared_expert_intermediate_size"],
        shared_gate=True,
        balance_coef=read_balance(hf),
    )
    return ModelConfig(
        family="qwen2_moe",
        **sizes,
        max_positions=hf.get("max_position_embeddings", 32768),
        pattern=spread_experts(sizes["num_layers"], pattern, experts, read_sparse_layers(hf)),
    )


def _config_to_hf(config: ModelConfig) -> JsonObject:
    experts, windows = find_experts(config), [kind.mixer.window for kind in config.layers]
    return {
        **write_sizes(config),
        **write_sparse_layers(config),
        **write_balance(experts),
        "qkv_bias": config.pattern[0].mixer.qkv_bias,
        "use_sliding_window": any(windows),
        "sliding_window": max((window for window in windows if window), default=None),
        "layer_types": [SLIDING if window else FULL for window in windows],
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "moe_intermediate_size": experts.expert_size,
        "shared_expert_intermediate_size": experts.shared_size,
        "norm_topk_prob": experts.renormalise,
    }


FAMILY = Family(
    name="qwen2_moe",
    published_as=("qwen2_moe",),
    causal_class="Qwen2MoeForCausalLM",
    critic_class="Qwen2MoeForSequenceClassification",
    rules=(*RULES, *EXPERTS, *list_shared("mlp.shared_expert"), SHARED_GATE),
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
)
