"""Rotary embedding in a config.json: transformers 5's `rope_parameters`, and 4's `rope_theta` and `rope_scaling`."""

import math
from dataclasses import replace

from realjax.core.json_text import JsonObject
from realjax.models.config import RopeConfig

# The keys of each `rope_type` beside those of all; transformers ignores `finetuned`.
KEYS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", "original_max_position_embeddings", "attention_factor", "mscale", "mscale_all_dim", "finetuned"}
    | {"beta_fast", "beta_slow", "truncate"},
    "longrope": {"factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"},
}
KEYS_OF_ALL = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def read_rope(
    hf: JsonObject, given: JsonObject | None = None, *, theta: float = 1e4, is_partial: bool = False
) -> RopeConfig:
    """Returns the rotary embedding that a config.json, or `given` parameters of it, ask for.

    `theta` is the family's where none is named; `is_partial`: heads may turn in part. Raises ValueError for what we do
    not compute.
    """
    of_5, of_4 = hf.get("rope_parameters"), hf.get("rope_scaling")
    asked: JsonObject = given or of_4 or of_5 or {}  # transformers, too, goes by that of 4 where a config has both
    params = {key: value for key, value in asked.items() if value is not None}
    kind = params.get("rope_type", params.get("type", "default"))
    unknown = sorted(set(params) - KEYS_OF_ALL - KEYS.get(kind, set()))
    if kind not in KEYS or unknown:
        raise ValueError(
            f"rotary embedding '{kind}' {f'with {unknown} ' if kind in KEYS else ''}is not supported (supported "
            f"rope_type: {', '.join(KEYS)}); to train at the original length, remove it from config.json and set "
            "max_position_embeddings to that length"
        )
    # Where a config has the original length outside of its rotary parameters, as Phi-3's, that one counts.
    original = hf.get("original_max_position_embeddings") or params.pop("original_max_position_embeddings", None)
    whole = hf.get("partial_rotary_factor") or 1.0
    outside = {"rope_theta": hf.get("rope_theta") or theta, "partial_rotary_factor": whole}
    params = {**outside, **params, "original": original}
    if (fraction := float(params["partial_rotary_factor"])) != 1 and not is_partial:
        raise ValueError(
            f"partial_rotary_factor is {fraction:g}, and in this family whole heads turn; use the config.json that "
            "belongs to the weights"
        )
    rope = RopeConfig(theta=float(params["rope_theta"]), fraction=fraction)
    return rope if kind == "default" else _read_scaling(replace(rope, scaling=kind), params, hf)


def _read_scaling(rope: RopeConfig, params: JsonObject, hf: JsonObject) -> RopeConfig:
    if rope.scaling in ("linear", "dynamic"):
        return replace(rope, factor=float(params["factor"]))
    original = int(params["original"] or hf["max_position_embeddings"])
    factor = float(params.get("factor") or hf["max_position_embeddings"] / original)
    rope = replace(rope, factor=factor, original_max_positions=original)
    if rope.scaling == "llama3":
        low, high = float(params["low_freq_factor"]), float(params["high_freq_factor"])
        return replace(rope, low_freq_factor=low, high_freq_factor=high)
    if rope.scaling == "yarn":
        rope = replace(
            rope,
            beta_fast=float(params.get("beta_fast") or 32),
            beta_slow=float(params.get("beta_slow") or 1),
            truncate=params.get("truncate", True),
        )
        computed = find_attention_factor(rope)
        if params.get("mscale") and params.get("mscale_all_dim"):
            computed = _scale_yarn(factor, params["mscale"]) / _scale_yarn(factor, params["mscale_all_dim"])
    else:
        computed = find_attention_factor(rope)
        # Which factors a model has follows from its own length, not from what a config calls its factor.
        short, long = (tuple(map(float, params[f"{name}_factor"])) for name in ("short", "long"))
        rope = replace(rope, factor=hf["max_position_embeddings"] / original, short_factors=short, long_factors=long)
    return replace(rope, attention_factor=float(params.get("attention_factor", computed)))


def find_attention_factor(rope: RopeConfig) -> float:
    """Returns the attention factor of a config that names none (arXiv:2309.00071, equation 22; arXiv:2402.13753)."""
    if rope.scaling == "yarn":
        return _scale_yarn(rope.factor)
    if rope.scaling == "longrope" and rope.factor > 1:
        return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_positions))
    return 1.0


def _scale_yarn(factor: float, weight: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def write_rope(rope: RopeConfig | None) -> JsonObject:
    """Returns the config.json keys of `read_rope`, in the spelling that transformers 4 and 5 read; its inverse."""
    if rope is None:
        raise ValueError("model config: layers without rotary embedding, which a HuggingFace config of this family has")
    keys: JsonObject = {"rope_theta": rope.theta, "rope_scaling": _write_scaling(rope)}
    return keys if rope.fraction == 1 else {**keys, "partial_rotary_factor": rope.fraction}


def _write_scaling(rope: RopeConfig) -> JsonObject | None:
    if rope.scaling == "none":
        return None
    keys: JsonObject = {"rope_type": rope.scaling}
    if rope.scaling == "longrope":
        keys |= {"short_factor": list(rope.short_factors), "long_factor": list(rope.long_factors)}
    else:
        keys |= {"factor": rope.factor}
    if rope.scaling in ("llama3", "yarn", "longrope"):
        keys |= {"original_max_position_embeddings": rope.original_max_positions}
    if rope.scaling == "llama3":
        keys |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    for key in ("beta_fast", "beta_slow", "truncate"):
        if getattr(rope, key) != getattr(RopeConfig(), key):
            keys[key] = getattr(rope, key)
    if rope.attention_factor != find_attention_factor(rope):
        keys |= {"attention_factor": rope.attention_factor}
    return keys
