"""What a HuggingFace directory holds beside the weights: config.json, tokenizer and generation files."""

import json
import shutil
from pathlib import Path

import numpy as np

from realjax.core.end_tokens import SCORED_END, EndTokens
from realjax.core.json_text import JsonObject
from realjax.hf.families import config_from_hf, config_to_hf, take_text
from realjax.hf.files import CONFIG, EXTRAS, read_json
from realjax.hf.generation import GENERATION_CONFIG
from realjax.models.config import ModelConfig

# Other spellings of what `config_to_hf` writes: left in a changed config they would contradict it.
STALE_KEYS = ("rope_parameters", "dtype", "layer_types", "num_labels")


def write_config(
    config: ModelConfig,
    out_dir: Path,
    source_dir: str | Path | None,
    dtype: np.dtype,
    ends: EndTokens | None = None,
) -> None:
    """Writes config.json for weights of `dtype`, and copies tokenizer and generation files from `source_dir`.

    Where the source's config describes the same model, all its keys are kept but the dtype and, with `ends`, what ends
    a text.
    """
    source = take_text(read_json(Path(source_dir) / CONFIG, "save: source")) if source_dir else {}
    if source and config_from_hf(source, "save: source") == config:
        hf = {**source, ("dtype" if "dtype" in source else "torch_dtype"): dtype.name}
    else:
        kept = {key: value for key, value in source.items() if key not in STALE_KEYS}
        hf = {**kept, **config_to_hf(config), "torch_dtype": dtype.name}
    hf |= _end_keys(hf, ends)
    if config.is_critic:
        hf["pad_token_id"] = _classifier_pad(hf, ends)
        hf |= {SCORED_END: ends.ids[0]} if ends else {}
    _write_json(out_dir / CONFIG, hf)
    if source_dir is None:
        return
    source_dir = Path(source_dir)
    for file in (file for pattern in EXTRAS for file in source_dir.glob(pattern)):
        target = out_dir / file.relative_to(source_dir)
        if file.name == GENERATION_CONFIG:
            generation = read_json(file, "save: source")
            if not config.is_critic:
                _write_json(target, generation | _end_keys(generation, ends))
        elif file.is_file():
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)


def _write_json(path: Path, value: JsonObject) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _end_keys(hf: JsonObject, ends: EndTokens | None) -> JsonObject:
    """Returns the keys of a config that say what ends a text; none where it says the same already."""
    named = hf.get("eos_token_id")
    if ends is None or set(named if isinstance(named, list) else [named]) == set(ends.ids):
        return {}
    first, *others = ends.ids
    return {"eos_token_id": [first, *others] if others else first}


def _classifier_pad(hf: JsonObject, ends: EndTokens | None) -> int | None:
    """Returns the source's padding token (the tokenizer's, if that pads with another), or None where it ends a text.

    transformers scores a sequence at its last token that is not padding: with such a token that would be the one before
    the end. Without a padding token it takes the last of a single sequence, and refuses a batch.
    """
    pad, eos = hf.get("pad_token_id"), hf.get("eos_token_id")
    own = pad if pad is None or ends is None or ends.pad is None else ends.pad
    return None if {pad, own} & set(eos if isinstance(eos, list) else [eos]) else own
