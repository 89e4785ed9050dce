"""OLMo 3: OLMo 2's layers, three with a sliding window for each without; those without may stretch their positions."""

from dataclasses import replace

from realjax.core.json_text import JsonObject
from realjax.hf.families import olmo2
from realjax.hf.families.llama_like import FULL, SLIDING, place_windows, read_pattern, read_sizes, write_sizes
from realjax.hf.families.rope import read_rope, write_rope
from realjax.hf.rules import Family
from realjax.models.config import ModelConfig, RopeConfig

THETA = 500000.0


def _read_ropes(hf: JsonObject) -> dict[str, RopeConfig]:
    """Returns the rotary embedding of each kind of layer; `rope_scaling` is of those without a window."""
    by_kind = hf.get("rope_parameters") or {}
    if not by_kind.keys() <= {FULL, SLIDING}:
        raise ValueError(f"rope_parameters {by_kind}; they need the keys {FULL} and {SLIDING}, with those of each kind")
    full = {"rope_type": "default", **(by_kind.get(FULL) or {}), **(hf.get("rope_scaling") or {})}
    sliding = {"rope_type": "default", **(by_kind.get(SLIDING) or {})}
    return {"full": read_rope(hf, full, theta=THETA), "sliding": read_rope(hf, sliding, theta=THETA)}


def _config_from_hf(hf: JsonObject, is_critic: bool) -> ModelConfig:
    num_layers, window, ropes = hf["num_hidden_layers"], hf["sliding_window"], _read_ropes(hf)
    kinds = hf.get("layer_types") or [FULL if i % 4 == 3 else SLIDING for i in range(num_layers)]
    if window is None and SLIDING in kinds:
        raise ValueError(f"sliding_window is null, and layer_types has {SLIDING}; it needs a number of tokens")
    pattern = read_pattern(hf, olmo2.read_mixer(hf), place_windows(kinds, window, num_layers), rope=ropes["full"])
    return ModelConfig(
        family="olmo3",
        **read_sizes(hf, is_critic),
        max_positions=hf["max_position_embeddings"],
        pattern=olmo2.norm_after(replace(kind, mixer=replace(kind.mixer, rope=ropes[kind.name])) for kind in pattern),
    )


def _config_to_hf(config: ModelConfig) -> JsonObject:
    windows = [kind.mixer.window for kind in config.layers]
    by_kind: JsonObject = {}
    for kind in config.pattern:
        spelled = write_rope(kind.mixer.rope)
        scaling = spelled["rope_scaling"] or {"rope_type": "default"}
        by_kind[SLIDING if kind.mixer.window else FULL] = {"rope_theta": spelled["rope_theta"], **scaling}
    scaling = next((write_rope(kind.mixer.rope) for kind in config.pattern if kind.mixer.window is None), {})
    return {
        **write_sizes(config),
        **scaling,  # as transformers 4 reads it
        "rope_parameters": by_kind,
        "attention_bias": config.pattern[0].mixer.qkv_bias,
        # transformers wants one whether or not a layer has it.
        "sliding_window": max(filter(None, windows), default=4096),
        "layer_types": [FULL if window is None else SLIDING for window in windows],
    }


FAMILY = Family(
    name="olmo3",
    published_as=("olmo3",),
    causal_class="Olmo3ForCausalLM",
    critic_class="Olmo3ForSequenceClassification",
    rules=olmo2.RULES,
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    defaults={**olmo2.DEFAULTS, "sliding_window": 4096},
)
