"""Config keys that Llama-like decoders share: sizes, activation and windows."""

from collections.abc import Sequence
from dataclasses import replace

from realjax.core.json_text import JsonObject
from realjax.hf.families.rope import read_rope, write_rope
from realjax.models.config import Activation, AttentionConfig, LayerKind, MLPConfig, ModelConfig, NormConfig, RopeConfig

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
HF_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}

FULL, SLIDING = "full_attention", "sliding_attention"  # transformers' names of layers in `layer_types`


def read_sizes(hf: JsonObject, is_critic: bool) -> JsonObject:
    """Returns the `ModelConfig` fields that all families spell alike, with transformers' defaults for absent keys.

    Raises KeyError for a size that has no default.
    """
    num_q_heads = hf["num_attention_heads"]
    return {
        "vocab_size": hf["vocab_size"],
        "hidden_size": hf["hidden_size"],
        "num_layers": hf["num_hidden_layers"],
        "num_q_heads": num_q_heads,
        "num_kv_heads": hf.get("num_key_value_heads") or num_q_heads,
        "head_dim": hf.get("head_dim") or hf["hidden_size"] // num_q_heads,
        "ffn_size": hf["intermediate_size"],
        "norm": read_norm(hf),
        "tied": bool(hf.get("tie_word_embeddings", False)) and not is_critic,
        "is_critic": is_critic,
    }


def read_norm(hf: JsonObject) -> NormConfig:
    """Returns the norm of all places."""
    return NormConfig(eps=hf.get("rms_norm_eps", 1e-6))


def read_pattern(
    hf: JsonObject,
    mixer: AttentionConfig,
    windows: Sequence[int | None] = (None,),
    *,
    rope: RopeConfig | None = None,
    mlp_bias: bool = False,
) -> tuple[LayerKind, ...]:
    """Returns the layers with windows that repeat; `mixer` says what is a family's own, rotary embedding apart.

    That is `rope`, or what `read_rope` finds. Raises ValueError for what we do not compute of it, or an activation.
    """
    norm, mixer = read_norm(hf), replace(mixer, rope=rope or read_rope(hf))
    feed_forward = MLPConfig(activation=read_activation(hf.get("hidden_act", "silu")), bias=mlp_bias)
    kind = LayerKind(name="full", mixer=mixer, feed_forward=feed_forward, attn_norm=norm, mlp_norm=norm)
    sliding = lambda window: replace(kind, name="sliding", mixer=replace(mixer, window=window))
    return tuple(kind if window is None else sliding(window) for window in windows)


def read_activation(name: str, key: str = "hidden_act") -> Activation:
    """Returns the activation that transformers calls `name`. Raises ValueError for one we do not compute."""
    if name not in ACTIVATIONS:
        raise ValueError(f"{key} '{name}' is not supported; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def read_windows(hf: JsonObject) -> list[int | None]:
    """Returns the attention windows of layers as they repeat, None where a layer has none.

    transformers gives the window to layers from `max_window_layers` on, or to those that `layer_types` names.
    """
    num_layers, window, first = hf["num_hidden_layers"], hf.get("sliding_window", 4096), hf.get("max_window_layers", 28)
    kinds = hf.get("layer_types") or [FULL if i < first else SLIDING for i in range(num_layers)]
    return place_windows(kinds, window if hf.get("use_sliding_window", False) else None, num_layers)


def place_windows(kinds: Sequence[str], window: int | None, num_layers: int) -> list[int | None]:
    """Returns the windows of layers as they repeat, of each layer's name in `layer_types`. ValueError for others."""
    if len(kinds) != num_layers or not set(kinds) <= {FULL, SLIDING}:
        raise ValueError(
            f"layer_types {kinds} for {num_layers} layers; it needs one of {FULL} and {SLIDING} for each layer"
        )
    windows = [window if kind == SLIDING else None for kind in kinds]
    return windows[: find_period(windows)]


def find_period(kinds: Sequence[object]) -> int:
    """Returns after how many layers their kinds repeat."""
    return next(n for n in range(1, len(kinds) + 1) if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))


def write_sizes(config: ModelConfig) -> JsonObject:
    """Returns the config.json keys of `read_sizes`; its inverse."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_q_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_size,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm.eps,
        "hidden_act": HF_ACTIVATIONS[config.pattern[0].feed_forward.activation],
        "tie_word_embeddings": config.tied,
        **write_rope(next(iter(config.ropes), None)),
    }


def write_windows(config: ModelConfig) -> JsonObject:
    """Returns the config.json keys of `read_windows`; its inverse."""
    windows = [kind.mixer.window for kind in config.layers]
    if not any(windows):
        return {"use_sliding_window": False, "sliding_window": None}
    num_full = windows.count(None)
    keys = {"use_sliding_window": True, "sliding_window": max(filter(None, windows)), "max_window_layers": num_full}
    if windows[:num_full] == [None] * num_full:
        return keys
    return {**keys, "layer_types": [FULL if window is None else SLIDING for window in windows]}
