"""Ministral 3: Mistral with YaRN, up to the original length, beyond which its queries grow with their position."""

from realjax.core.json_text import JsonObject
from realjax.hf.families.llama_like import read_pattern, read_sizes, write_sizes
from realjax.hf.families.rope import read_rope
from realjax.hf.families.tables import RULES
from realjax.hf.rules import Family
from realjax.models.config import AttentionConfig, ModelConfig


def _config_from_hf(hf: JsonObject, is_critic: bool) -> ModelConfig:
    given, longest = {**(hf.get("rope_scaling") or hf["rope_parameters"])}, hf["max_position_embeddings"]
    given.pop("max_position_embeddings", None)
    original = given.get("original_max_position_embeddings") or longest
    # Queries at position p are 1 + beta * log(1 + floor(p / original)) times as large.
    if given.pop("llama_4_scaling_beta", None) and longest > original:
        raise ValueError(
            f"llama_4_scaling_beta: queries that grow with their position beyond {original} tokens are not supported; "
            f"set max_position_embeddings to {original}, up to which they do not"
        )
    if given.get("rope_type", given.get("type", "default")) == "default":
        given.pop("original_max_position_embeddings", None)
    return ModelConfig(
        family="ministral3",
        **read_sizes(hf, is_critic),
        max_positions=longest,
        pattern=read_pattern(hf, AttentionConfig(), [hf.get("sliding_window")], rope=read_rope(hf, given)),
    )


def _config_to_hf(config: ModelConfig) -> JsonObject:
    hf = {**write_sizes(config), "sliding_window": config.pattern[0].mixer.window}
    theta, scaling = hf.pop("rope_theta"), hf.pop("rope_scaling") or {"rope_type": "default"}
    # transformers reads both of these for its scale, which is 1 then.
    scale = {"llama_4_scaling_beta": 0.0, "original_max_position_embeddings": config.max_positions}
    return {**hf, "rope_parameters": {"rope_theta": theta, **scale, **scaling}}


FAMILY = Family(
    name="ministral3",
    published_as=("ministral3",),
    causal_class="Ministral3ForCausalLM",
    critic_class="Ministral3ForSequenceClassification",
    rules=RULES,
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    defaults={
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-5,
        "head_dim": 128,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "llama_4_scaling_beta": 0.1}
        | {"original_max_position_embeddings": 16384, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
)
