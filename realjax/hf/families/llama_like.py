"""What every Llama-like decoder shares: its tensors, and the config keys of sizes, activation, rotary and windows."""

from collections.abc import Sequence
from dataclasses import replace

from realjax.core.json_text import JsonObject
from realjax.hf.rules import Rule
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
_LAYER = "model.layers.{layer}."

# Biases and q/k norms stand here once for all families: a rule is used only where the model has the leaf.
RULES = (
    Rule("embed/table", "model.embed_tokens.weight", "V D -> V D"),
    Rule("layers/attn_norm/scale", _LAYER + "input_layernorm.weight", "D -> D"),
    Rule("layers/attn/q/kernel", _LAYER + "self_attn.q_proj.weight", "(N H) D -> D N H"),
    Rule("layers/attn/k/kernel", _LAYER + "self_attn.k_proj.weight", "(K H) D -> D K H"),
    Rule("layers/attn/v/kernel", _LAYER + "self_attn.v_proj.weight", "(K H) D -> D K H"),
    Rule("layers/attn/q/bias", _LAYER + "self_attn.q_proj.bias", "(N H) -> N H"),
    Rule("layers/attn/k/bias", _LAYER + "self_attn.k_proj.bias", "(K H) -> K H"),
    Rule("layers/attn/v/bias", _LAYER + "self_attn.v_proj.bias", "(K H) -> K H"),
    Rule("layers/attn/q_norm/scale", _LAYER + "self_attn.q_norm.weight", "H -> H"),
    Rule("layers/attn/k_norm/scale", _LAYER + "self_attn.k_norm.weight", "H -> H"),
    Rule("layers/attn/o/kernel", _LAYER + "self_attn.o_proj.weight", "D (N H) -> N H D"),
    Rule("layers/attn/o/bias", _LAYER + "self_attn.o_proj.bias", "D -> D"),
    Rule("layers/mlp_norm/scale", _LAYER + "post_attention_layernorm.weight", "D -> D"),
    Rule("layers/mlp/gate/kernel", _LAYER + "mlp.gate_proj.weight", "F D -> D F"),
    Rule("layers/mlp/up/kernel", _LAYER + "mlp.up_proj.weight", "F D -> D F"),
    Rule("layers/mlp/down/kernel", _LAYER + "mlp.down_proj.weight", "D F -> F D"),
    Rule("layers/mlp/gate/bias", _LAYER + "mlp.gate_proj.bias", "F -> F"),
    Rule("layers/mlp/up/bias", _LAYER + "mlp.up_proj.bias", "F -> F"),
    Rule("layers/mlp/down/bias", _LAYER + "mlp.down_proj.bias", "D -> D"),
    Rule("norm/scale", "model.norm.weight", "D -> D"),
    Rule("head/kernel", "lm_head.weight", "V D -> D V"),
)


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
    hf: JsonObject, mixer: AttentionConfig, windows: Sequence[int | None] = (None,), *, mlp_bias: bool = False
) -> tuple[LayerKind, ...]:
    """Returns the layers with windows that repeat; `mixer` says what is a family's own, rotary embedding apart.

    Raises ValueError for an activation or rotary scaling we do not compute.
    """
    if (activation := hf.get("hidden_act", "silu")) not in ACTIVATIONS:
        raise ValueError(f"hidden_act '{activation}' is not supported; supported: {', '.join(ACTIVATIONS)}")
    norm, mixer = read_norm(hf), replace(mixer, rope=read_rope(hf))
    feed_forward = MLPConfig(activation=ACTIVATIONS[activation], bias=mlp_bias)
    kind = LayerKind(name="full", mixer=mixer, feed_forward=feed_forward, attn_norm=norm, mlp_norm=norm)
    sliding = lambda window: replace(kind, name="sliding", mixer=replace(mixer, window=window))
    return tuple(kind if window is None else sliding(window) for window in windows)


def read_rope(hf: JsonObject) -> RopeConfig:
    """Returns the rotary embedding from transformers 5's `rope_parameters` or 4's `rope_theta` and `rope_scaling`."""
    params = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = params.get("rope_type", params.get("type", "default"))
    theta = float(params.get("rope_theta", hf.get("rope_theta") or 10000.0))
    if params.get("partial_rotary_factor", hf.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError("partial_rotary_factor other than 1 is not supported; use a model with full rotary embedding")
    if kind == "default" and set(params) <= {"rope_type", "type", "rope_theta", "partial_rotary_factor"}:
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, scaling="linear", factor=float(params["factor"]))
    if kind == "llama3":
        return RopeConfig(
            theta=theta,
            scaling="llama3",
            factor=float(params["factor"]),
            low_freq_factor=float(params["low_freq_factor"]),
            high_freq_factor=float(params["high_freq_factor"]),
            original_max_positions=int(params["original_max_position_embeddings"]),
        )
    raise ValueError(
        f"rotary embedding {dict(params)} is not supported (supported rope_type: default, linear, llama3); to train at "
        "the original length, remove it from config.json and set max_position_embeddings to that length"
    )


def read_windows(hf: JsonObject) -> list[int | None]:
    """Returns the attention windows of layers as they repeat, None where a layer has none.

    transformers gives the window to layers from `max_window_layers` on, or to those that `layer_types` names.
    """
    num_layers, window = hf["num_hidden_layers"], hf.get("sliding_window", 4096)
    if not hf.get("use_sliding_window", False) or window is None:
        return [None]
    first = hf.get("max_window_layers", 28)
    kinds = hf.get("layer_types") or [FULL if i < first else SLIDING for i in range(num_layers)]
    if len(kinds) != num_layers or not set(kinds) <= {FULL, SLIDING}:
        raise ValueError(
            f"layer_types {kinds} for {num_layers} layers; it needs one of {FULL} and {SLIDING} for each layer"
        )
    return [window if kind == SLIDING else None for kind in kinds[: find_period(kinds)]]


def find_period(kinds: Sequence[object]) -> int:
    """Returns after how many of the layers their kinds repeat; as many as there are where they do not."""
    return next(n for n in range(1, len(kinds) + 1) if all(kinds[i] == kinds[i % n] for i in range(len(kinds))))


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
        **_write_rope(config.pattern[0].mixer.rope),
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


def _write_rope(rope: RopeConfig | None) -> JsonObject:
    if rope is None:
        raise ValueError("model config: layers without rotary embedding, which a HuggingFace config of this family has")
    if rope.scaling == "none":
        return {"rope_theta": rope.theta, "rope_scaling": None}
    scaling: JsonObject = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling == "llama3":
        scaling |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_positions,
        }
    return {"rope_theta": rope.theta, "rope_scaling": scaling}
