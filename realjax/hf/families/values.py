"""What may stand behind the keys of a config.json, before anything computes with it."""

from collections.abc import Callable, Mapping

from realjax.core.json_text import JsonObject

# XLA counts the entries of a dimension in 32 bits.
MOST = 2**31 - 1
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "no_rope_layer_interval",
    "num_labels",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "n_routed_experts",
    "n_shared_experts",
    "n_group",
    "topk_group",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "decoder_sparse_step",
    "query_pre_attn_scalar",
    "sliding_window_pattern",
    "n_embd",
    "n_inner",
    "n_layer",
    "n_head",
    "n_positions",
)
COUNTS = ("first_k_dense_replace", "max_window_layers", "sliding_window")  # a window of 0 is none
NUMBERS = (
    "rms_norm_eps",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "attention_factor",
    "swiglu_alpha",
    "swiglu_limit",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "routed_scaling_factor",
    "layer_norm_epsilon",
    "rope_local_base_freq",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)
SWITCHES = (
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "use_sliding_window",
    "norm_topk_prob",
    "use_qk_norm",
    "output_router_logits",
    "truncate",
    "use_bidirectional_attention",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn",
    "add_cross_attention",
    "qkv_bias",
)
TEXTS = ("model_type", "hidden_act", "hidden_activation", "activation_function", "rope_type", "type")
ROPES = ("rope_parameters", "rope_scaling", "full_attention", "sliding_attention")
TABLES = (*ROPES, "id2label")
LISTS = ("architectures", "layer_types")
NUMBER_LISTS = ("short_factor", "long_factor")
COUNT_LISTS = ("no_rope_layers", "mlp_only_layers")
# What some writers put where they mean that there is none, or the default.
MAY_BE_NULL = frozenset(
    {"num_key_value_heads", "head_dim", "sliding_window", "rope_theta", "num_labels", *TABLES, *LISTS, *COUNT_LISTS}
    | {"n_inner", "attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"}
    | {
        "hidden_activation",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "partial_rotary_factor",
    }
)


def check_values(hf: JsonObject, subject: str) -> None:
    """Raises ValueError, naming `subject`, for a value of the wrong type or range in a config.json that we read."""
    kinds = {
        **dict.fromkeys(SIZES, (_is_size, "a whole number from 1 to 2^31")),
        **dict.fromkeys(COUNTS, (_is_count, "a whole number from 0 to 2^31")),
        **dict.fromkeys(NUMBERS, (_is_number, "a number above 0")),
        **dict.fromkeys(SWITCHES, (lambda x: isinstance(x, bool), "true or false")),
        **dict.fromkeys(TEXTS, (lambda x: isinstance(x, str), "a text")),
        **dict.fromkeys(TABLES, (lambda x: isinstance(x, Mapping), "an object")),
        **dict.fromkeys(LISTS, (lambda x: _is_list(x, lambda text: isinstance(text, str)), "a list of texts")),
        **dict.fromkeys(NUMBER_LISTS, (lambda x: _is_list(x, _is_number), "a list of numbers above 0")),
        **dict.fromkeys(COUNT_LISTS, (lambda x: _is_list(x, _is_count), "a list of whole numbers")),
    }
    for key, value in hf.items():
        if key not in kinds or (value is None and key in MAY_BE_NULL):
            continue
        is_right, needed = kinds[key]
        if not is_right(value):
            found = "null" if value is None else repr(value)
            shown = found if len(found) <= 60 else f"{found[:60]}..."
            raise ValueError(
                f"{subject}: {key} is {shown}; it must be {needed}: use the config.json that belongs to the weights"
            )
    for key in ROPES:
        if inner := hf.get(key):
            check_values(inner, f"{subject}: {key}")


def _is_size(value: object) -> bool:
    return _is_count(value) and value != 0


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _is_list(value: object, is_right: Callable[[object], bool]) -> bool:
    return isinstance(value, list) and all(map(is_right, value))
