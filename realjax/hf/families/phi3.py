"""Phi-3, Phi-3.5 and Phi-4: q, k and v in one tensor, gate and up in another; heads that turn in part, LongRoPE."""

from realjax.core.json_text import JsonObject
from realjax.hf.families.llama_like import read_pattern, read_sizes, write_sizes
from realjax.hf.families.rope import read_rope
from realjax.hf.families.tables import LAYER, change, fuse
from realjax.hf.rules import Family
from realjax.models.config import AttentionConfig, ModelConfig

RULES = change(
    *fuse(
        LAYER + "self_attn.qkv_proj.weight",
        {
            "layers/attn/q/kernel": "(([N] + K + K) H) D -> D N H",
            "layers/attn/k/kernel": "((N + [K] + K) H) D -> D K H",
            "layers/attn/v/kernel": "((N + K + [K]) H) D -> D K H",
        },
    ),
    *fuse(
        LAYER + "mlp.gate_up_proj.weight",
        {"layers/mlp/gate/kernel": "([F] + F) D -> D F", "layers/mlp/up/kernel": "(F + [F]) D -> D F"},
    ),
)


def _config_from_hf(hf: JsonObject, is_critic: bool) -> ModelConfig:
    given = {**(hf.get("rope_scaling") or hf.get("rope_parameters") or {})}
    for key in {"rope_type", "type"} & given.keys():
        # Older names of LongRoPE in this family.
        given[key] = "longrope" if given[key] in ("su", "yarn") else given[key]
    return ModelConfig(
        family="phi3",
        **read_sizes(hf, is_critic),
        max_positions=hf["max_position_embeddings"],
        pattern=read_pattern(hf, AttentionConfig(), [hf["sliding_window"]], rope=read_rope(hf, given, is_partial=True)),
    )


def _config_to_hf(config: ModelConfig) -> JsonObject:
    hf = {**write_sizes(config), "sliding_window": config.pattern[0].mixer.window}
    if scaling := hf["rope_scaling"]:
        # transformers 4 wants the original length outside, `type`, and nothing else that it does not need.
        hf["original_max_position_embeddings"] = scaling.pop("original_max_position_embeddings")
        hf["rope_scaling"] = {"type": scaling.pop("rope_type"), **scaling}
    return hf


FAMILY = Family(
    name="phi3",
    published_as=("phi3", "phi4"),
    causal_class="Phi3ForCausalLM",
    critic_class="Phi3ForSequenceClassification",
    rules=RULES,
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    defaults={
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    },
)
