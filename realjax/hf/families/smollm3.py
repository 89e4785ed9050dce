"""SmolLM3: Llama's layers, of which every fourth knows no positions; the head is the embedding."""

from dataclasses import replace

from realjax.core.json_text import JsonObject
from realjax.hf.families.llama_like import find_period, read_pattern, read_sizes, write_sizes
from realjax.hf.families.rope import read_rope
from realjax.hf.families.tables import RULES
from realjax.hf.rules import Family
from realjax.models.config import AttentionConfig, ModelConfig

THETA = 2000000.0


def _config_from_hf(hf: JsonObject, is_critic: bool) -> ModelConfig:
    if hf.get("use_sliding_window", False) and hf.get("sliding_window") is not None:
        raise ValueError(
            f"use_sliding_window with sliding_window={hf['sliding_window']}, which is not supported for SmolLM3; use a "
            "model without it"
        )
    num_layers, interval, bias = hf["num_hidden_layers"], hf["no_rope_layer_interval"], hf.get("attention_bias", False)
    turns = hf.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(num_layers)]  # 1: it has positions
    if len(turns) < num_layers or not set(turns) <= {0, 1}:
        raise ValueError(f"no_rope_layers {turns} for {num_layers} layers; it needs 0 or 1 for each layer")
    turns = turns[:num_layers]
    (kind,) = read_pattern(
        hf,
        AttentionConfig(qkv_bias=bias, o_bias=bias),
        rope=read_rope(hf, theta=THETA),
        mlp_bias=hf.get("mlp_bias", False),
    )
    without = replace(kind, name="nope", mixer=replace(kind.mixer, rope=None))
    return ModelConfig(
        family="smollm3",
        **read_sizes(hf, is_critic),
        max_positions=hf["max_position_embeddings"],
        pattern=tuple(kind if turn else without for turn in turns[: find_period(turns)]),
    )


def _config_to_hf(config: ModelConfig) -> JsonObject:
    kind = config.pattern[0]
    turns = [int(kind.mixer.rope is not None) for kind in config.layers]
    biases = {"attention_bias": kind.mixer.qkv_bias, "mlp_bias": kind.feed_forward.bias}
    return {
        **write_sizes(config),
        **biases,
        "no_rope_layers": turns,
        "use_sliding_window": False,
        "sliding_window": None,
    }


FAMILY = Family(
    name="smollm3",
    published_as=("smollm3",),
    causal_class="SmolLM3ForCausalLM",
    critic_class="SmolLM3ForSequenceClassification",
    rules=RULES,
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    defaults={"max_position_embeddings": 32768, "no_rope_layer_interval": 4, "tie_word_embeddings": True},
)
