"""What a checkpoint says about generation: the tokens that end an answer."""

from pathlib import Path
from typing import TYPE_CHECKING

from realjax.core.end_tokens import EndTokens
from realjax.hf.files import CONFIG, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION_CONFIG = "generation_config.json"


def load_end_tokens(path: Path, tokenizer: "PreTrainedTokenizerBase") -> EndTokens:
    """Returns what ends the texts that a model at `path` is trained on. Raises ValueError as `load_eos_ids` does."""
    own, pad = (getattr(tokenizer, f"{kind}_token_id") for kind in ("eos", "pad"))
    ids = load_eos_ids(path, tokenizer)
    return EndTokens(ids=tuple(sorted(ids, key=lambda token: token != own)), pad=pad)


def load_eos_ids(path: Path, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """Returns the ids of the end-of-text tokens, sorted: those of generation_config.json, else of config.json, and the
    tokenizer's, with which answers end in training.

    Raises ValueError when there is none, or for anything but ids.
    """
    own: object = tokenizer.eos_token_id
    named = None
    for file in (GENERATION_CONFIG, CONFIG):
        if named is None and (path / file).is_file():
            named = read_json(path / file, "model path").get("eos_token_id")
    found = [*(named if isinstance(named, list) else [named]), own]
    ids = {token for token in found if token is not None}
    if not all(isinstance(token, int) and token >= 0 for token in ids):
        raise ValueError(f"model path '{path}': eos_token_id is {named!r}; it must be a token's id, or a list of ids")
    if not ids:
        raise ValueError(
            f"model path '{path}' names no end-of-text token, so no answer could end; set eos_token_id in "
            f"{GENERATION_CONFIG}, or eos_token in tokenizer_config.json"
        )
    return tuple(sorted(ids))
