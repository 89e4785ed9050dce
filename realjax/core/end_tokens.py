"""The tokens that end a sequence: what a model is trained on, and what its checkpoint has to name."""

from dataclasses import dataclass

# The key of a reward model's config.json with the token that ended every text of its training.
SCORED_END = "scored_end_token_id"


@dataclass(frozen=True, kw_only=True)
class EndTokens:
    """Tokens that end a text, that of training (the tokenizer's EOS) first, and the tokenizer's padding."""

    ids: tuple[int, ...]
    pad: int | None = None
