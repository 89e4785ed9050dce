"""GLM-4.5 and 4.6: a router of sigmoids with an offset, which chooses from groups; the first layers are dense."""

from realjax.core.json_text import JsonObject
from realjax.hf.families.llama_like import read_norm, read_pattern, read_sizes, write_sizes
from realjax.hf.families.moe_like import EXPERTS, find_experts, list_shared, spread_experts
from realjax.hf.families.rope import read_rope
from realjax.hf.families.tables import LAYER, change
from realjax.hf.rules import Family, Rule
from realjax.models.config import AttentionConfig, MLPConfig, ModelConfig, MoEConfig

RULES = change(
    *EXPERTS,
    *list_shared("mlp.shared_experts"),
    Rule("layers/mlp/router/offset", LAYER + "mlp.gate.e_score_correction_bias", "E -> E"),
)


def _config_from_hf(hf: JsonObject, is_critic: bool) -> ModelConfig:
    sizes, size = read_sizes(hf, is_critic), hf["moe_intermediate_size"]
    norm = read_norm(hf) if hf.get("use_qk_norm", False) else None
    mixer = AttentionConfig(qkv_bias=bool(hf.get("attention_bias", False)), qk_norm=norm)
    pattern = read_pattern(hf, mixer, rope=read_rope(hf, is_partial=True))
    experts = MoEConfig(
        num_experts=hf["n_routed_experts"],
        experts_per_token=hf.get("num_experts_per_tok", 8),
        expert_size=size,
        scores="sigmoid",
        has_offset=True,
        renormalise=bool(hf.get("norm_topk_prob", True)),
        scale=float(hf.get("routed_scaling_factor", 1.0)),
        num_groups=hf.get("n_group", 1),
        groups_per_token=hf.get("topk_group", 1),
        activation=pattern[0].feed_forward.activation,
        shared_size=size * hf.get("n_shared_experts", 1),
    )
    is_sparse = [i >= hf.get("first_k_dense_replace", 1) for i in range(sizes["num_layers"])]
    pattern = spread_experts(sizes["num_layers"], pattern, experts, is_sparse)
    return ModelConfig(family="glm4_moe", **sizes, max_positions=hf["max_position_embeddings"], pattern=pattern)


def _config_to_hf(config: ModelConfig) -> JsonObject:
    experts, mixer = find_experts(config), config.pattern[0].mixer
    return {
        **write_sizes(config),
        "partial_rotary_factor": config.ropes[0].fraction,
        "attention_bias": mixer.qkv_bias,
        "use_qk_norm": mixer.qk_norm is not None,
        "first_k_dense_replace": sum(isinstance(kind.feed_forward, MLPConfig) for kind in config.layers),
        "n_routed_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "moe_intermediate_size": experts.expert_size,
        "n_shared_experts": (experts.shared_size or 0) // experts.expert_size,
        "n_group": experts.num_groups,
        "topk_group": experts.groups_per_token,
        "norm_topk_prob": experts.renormalise,
        "routed_scaling_factor": experts.scale,
    }


FAMILY = Family(
    name="glm4_moe",
    published_as=("glm4_moe",),
    causal_class="Glm4MoeForCausalLM",
    critic_class="Glm4MoeForSequenceClassification",  # a name of ours
    rules=RULES,
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    defaults={
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "n_routed_experts": 128,
        "moe_intermediate_size": 1408,
    },
    has_more_layers=True,
)
