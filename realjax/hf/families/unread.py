"""Keys of a config.json that a family did not read: what they ask for is refused, not left out."""

import re
from collections.abc import Mapping
from typing import Any

from realjax.core.json_text import JsonObject

# A key with one of these words says how a model computes, in every decoder of transformers.
OF_ATTENTION = {"alibi", "attention", "attn", "causal", "chunk", "qk", "sink", "sinks", "swa", "window", "windows"}
OF_POSITIONS = {"embeddings", "interleaved", "mrope", "nope", "rope", "rotary", "yarn"}
OF_FACTORS = {"alpha", "factor", "fraction", "multiplier", "multipliers", "rescale", "scale", "scaled", "scaling"}
OF_BOUNDS = {"cap", "clip", "logit", "logits", "mup", "soft", "softcap", "softcapping"}
OF_VALUES = {"act", "activation", "beta", "bias", "layernorm", "ln", "norm", "sparsity", "swiglu"}
OF_LAYERS = {"experts", "gate", "gating", "moe", "parallel", "residual", "shared", "types"}
WORDS = OF_ATTENTION | OF_POSITIONS | OF_FACTORS | OF_BOUNDS | OF_VALUES | OF_LAYERS
# Where one of these stands too, the key is of training, of initial values or of how numbers are kept.
HARMLESS_WORDS = {"coef", "dropout", "float32", "fp32", "implementation", "init", "initializer", "loss", "pdrop"}
HARMLESS = frozenset(
    {
        "chunk_size_feed_forward",  # how much of a feed-forward is computed at once
        "classifier_bias",
        "full_attn_mod",
        "is_causal",
        "max_window_layers",  # where a sliding window begins; it is `sliding_window` that asks for one
        "num_attention_heads",
        "num_logits_to_keep",
        "output_router_logits",
        "tie_word_embeddings",
    }
)


class ReadKeys(dict[str, Any]):
    """A config.json that knows which of its keys were asked for."""

    def __init__(self, hf: JsonObject) -> None:
        super().__init__(hf)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)


def check_unread(hf: ReadKeys) -> None:
    """Raises ValueError for a key that was not read and asks for something that changes what a model computes."""
    for key, value in hf.items():
        if key not in hf.read and asks(key, value):
            raise ValueError(
                f"{key} is {value!r}, which this family does not compute here; if the weights were made without it, "
                "remove it from config.json, else use a model without it"
            )


def asks(key: str, value: object) -> bool:
    """Returns whether a key of a config.json with this value changes what a model computes, by the words in it."""
    words = set(re.split(r"[^a-z0-9]+", key.lower()))
    if key in HARMLESS or not words & WORDS or words & HARMLESS_WORDS:
        return False
    return not _is_none(value, words)


def _is_none(value: object, words: set[str]) -> bool:
    """Returns whether a value says that there is nothing of the kind."""
    if value is None or value is False or value == "" or isinstance(value, list | Mapping) and not value:
        return True
    if isinstance(value, int | float):
        return value == 1 and value is not True and bool(words & OF_FACTORS)
    return isinstance(value, list) and set(map(str, value)) == {"full_attention"}
