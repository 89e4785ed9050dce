"""Granite with experts in every layer: three tensors hold a layer's."""

from dataclasses import replace

from realjax.core.json_text import JsonObject
from realjax.hf.families.granite import DEFAULTS, read_granite, write_granite
from realjax.hf.families.moe_like import count_experts, find_experts, read_balance, spread_experts, write_balance
from realjax.hf.families.tables import LAYER, change, fuse
from realjax.hf.rules import Family, Rule
from realjax.models.config import ModelConfig, MoEConfig

RULES = change(
    Rule("layers/mlp/router/kernel", LAYER + "block_sparse_moe.router.layer.weight", "E D -> D E"),
    *fuse(
        LAYER + "block_sparse_moe.input_linear.weight",
        {
            "layers/mlp/experts/gate/kernel": "E ([M] + M) D -> E D M",
            "layers/mlp/experts/up/kernel": "E (M + [M]) D -> E D M",
        },
    ),
    Rule("layers/mlp/experts/down/kernel", LAYER + "block_sparse_moe.output_linear.weight", "E D M -> E M D"),
)


def _config_from_hf(hf: JsonObject, is_critic: bool) -> ModelConfig:
    dense = read_granite(hf, is_critic, mlp_bias=False)
    experts = MoEConfig(
        num_experts=count_experts(hf),
        experts_per_token=hf.get("num_experts_per_tok", 2),
        expert_size=hf["intermediate_size"],
        scores="softmax_of_chosen",
        activation=dense.pattern[0].feed_forward.activation,
        balance_coef=read_balance(hf),
    )
    sparse = spread_experts(dense.num_layers, dense.pattern, experts, [True] * dense.num_layers)
    return replace(dense, family="granitemoe", pattern=sparse)


def _config_to_hf(config: ModelConfig) -> JsonObject:
    experts = find_experts(config)
    return {
        **write_granite(config),
        **write_balance(experts),
        "intermediate_size": experts.expert_size,
        "num_local_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
    }


FAMILY = Family(
    name="granitemoe",
    published_as=("granitemoe",),
    causal_class="GraniteMoeForCausalLM",
    critic_class="GraniteMoeForSequenceClassification",  # a name of ours
    rules=RULES,
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    defaults={**DEFAULTS, "num_local_experts": 8},
)
