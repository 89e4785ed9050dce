"""gpt-oss: experts with biases and a clamped gate, learned sinks, a window in every second layer. The published weights
are quantised (mxfp4), which is refused: those of a conversion to bfloat16 are read.
"""

from realjax.core.json_text import JsonObject
from realjax.hf.families.llama_like import FULL, SLIDING, place_windows, read_pattern, read_sizes, write_sizes
from realjax.hf.families.moe_like import count_experts, find_experts, read_balance, spread_experts, write_balance
from realjax.hf.families.tables import LAYER, change, fuse
from realjax.hf.rules import Family, Rule
from realjax.models.config import AttentionConfig, ModelConfig, MoEConfig

RULES = change(
    Rule("layers/attn/sinks", LAYER + "self_attn.sinks", "N -> N"),
    Rule("layers/mlp/router/kernel", LAYER + "mlp.router.weight", "E D -> D E"),
    Rule("layers/mlp/router/bias", LAYER + "mlp.router.bias", "E -> E"),
    *fuse(
        LAYER + "mlp.experts.gate_up_proj",
        {
            "layers/mlp/experts/gate/kernel": "E D (M ([1] + 1)) -> E D M",
            "layers/mlp/experts/up/kernel": "E D (M (1 + [1])) -> E D M",
        },
    ),
    *fuse(
        LAYER + "mlp.experts.gate_up_proj_bias",
        {
            "layers/mlp/experts/gate/bias": "E (M ([1] + 1)) -> E M",
            "layers/mlp/experts/up/bias": "E (M (1 + [1])) -> E M",
        },
    ),
    Rule("layers/mlp/experts/down/kernel", LAYER + "mlp.experts.down_proj", "E M D -> E M D"),
    Rule("layers/mlp/experts/down/bias", LAYER + "mlp.experts.down_proj_bias", "E D -> E D"),
)
DEFAULTS: JsonObject = {"head_dim": 64, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": 150000.0}


def _config_from_hf(hf: JsonObject, is_critic: bool) -> ModelConfig:
    sizes, bias = read_sizes(hf, is_critic), bool(hf.get("attention_bias", True))
    if (activation := hf.get("hidden_act", "silu")) != "silu":
        raise ValueError(f"hidden_act '{activation}' is not supported; gpt-oss has silu in its clamped gate")
    types = hf.get("layer_types") or [FULL if i % 2 else SLIDING for i in range(sizes["num_layers"])]
    windows = place_windows(types, hf.get("sliding_window", 128), sizes["num_layers"])
    experts = MoEConfig(
        num_experts=count_experts(hf),
        experts_per_token=hf.get("num_experts_per_tok", 4),
        expert_size=hf["intermediate_size"],
        scores="softmax_of_chosen",
        router_bias=True,
        bias=True,
        limit=float(hf.get("swiglu_limit", 7.0)),
        alpha=float(hf.get("swiglu_alpha", 1.702)),
        balance_coef=read_balance(hf),
    )
    pattern = read_pattern(hf, AttentionConfig(qkv_bias=bias, o_bias=bias, sinks=True), windows)
    return ModelConfig(
        family="gpt_oss",
        **sizes,
        max_positions=hf["max_position_embeddings"],
        pattern=spread_experts(sizes["num_layers"], pattern, experts, [True] * sizes["num_layers"]),
    )


def _config_to_hf(config: ModelConfig) -> JsonObject:
    experts, windows = find_experts(config), [kind.mixer.window for kind in config.layers]
    return {
        **write_sizes(config),
        **write_balance(experts),
        "intermediate_size": experts.expert_size,
        "attention_bias": config.pattern[0].mixer.qkv_bias,
        "sliding_window": max(filter(None, windows), default=None),
        "layer_types": [SLIDING if window else FULL for window in windows],
        "num_local_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "swiglu_limit": experts.limit,
        "swiglu_alpha": experts.alpha,
    }


FAMILY = Family(
    name="gpt_oss",
    published_as=("gpt_oss",),
    causal_class="GptOssForCausalLM",
    critic_class="GptOssForSequenceClassification",
    rules=RULES,
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    defaults=DEFAULTS,
)
