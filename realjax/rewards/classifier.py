"""A HuggingFace sequence classifier as a reward: it reads texts with its own tokenizer, in PyTorch on the host."""

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from realjax.core.end_tokens import SCORED_END
from realjax.rewards.functions import Row, TextFn

_log = logging.getLogger("realjax.rewards")

# Some tokenizers give this kind of number for "no limit".
NO_LIMIT = 1_000_000


def load_classifier(
    path: str | Path,
    *,
    label: str | None = None,
    with_eos: bool | None = None,
    batch_size: int = 16,
    name: str = "reward.classifier",
) -> TextFn:
    """Returns the function whose reward is a classifier's logit, in float32, of the text prompt + answer.

    The logit is that of `label`, or the last one (of two labels the positive, of one the score). `with_eos` ends each
    text with end-of-text; None does so for models that say that they were trained so, as realjax's reward models do. A
    text longer than the classifier can read loses its beginning. Raises ValueError, naming the option `name`, without
    PyTorch, for a directory that holds no classifier or numbers that are not finite, and for a label or an end that it
    has not.
    """
    if importlib.util.find_spec("torch") is None:
        raise ValueError(f"{name}: '{path}' needs PyTorch, which is not installed; run `pip install realjax[torch]`")
    import torch  # an extra, and slow to import

    tokenizer, model = _load(path, name)
    column = _find_column(model.config, label, path, name)
    end = _find_end(tokenizer, model.config, with_eos, path, name)
    _choose_padding(tokenizer, model.config, end)
    longest = _longest(tokenizer, model)
    room = None if longest is None else longest - (end is not None)

    @torch.inference_mode()
    def score(prompts: Sequence[str], answers: Sequence[str], rows: Sequence[Row]) -> list[float]:
        texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        rewards = np.zeros(len(texts))
        # Neighbours in length share a batch, so that little of it is padding.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for first in range(0, len(order), batch_size):
            part = order[first : first + batch_size]
            inputs = tokenizer([texts[i] for i in part], truncation=room is not None, max_length=room)
            if end is not None:
                inputs = {"input_ids": [ids if ids[-1:] == [end] else [*ids, end] for ids in inputs["input_ids"]]}
            inputs = tokenizer.pad(inputs, return_tensors="pt")
            rewards[part] = model(**inputs).logits[:, column].float().numpy()
        return rewards.tolist()

    return score


def _load(path: str | Path, name: str) -> tuple[Any, Any]:
    """Returns tokenizer and model, ready for texts of several lengths at once."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, truncation_side="left")
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path, output_loading_info=True, dtype="float32"
        )
    except Exception as error:  # the formats of weights, config and tokenizer have errors of many classes
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{name}: '{path}' is no sequence classifier that transformers can load ({reason}); give a directory or "
            "hub identifier with weights, config.json and a tokenizer"
        ) from error
    if missing := sorted(info["missing_keys"]):
        # transformers fills them at random and goes on: a language model would pass for a classifier.
        raise ValueError(
            f"{name}: '{path}' lacks the weights {', '.join(missing[:3])}; it needs a model trained as a "
            "sequence classifier"
        )
    if broken := [key for key, tensor in model.named_parameters() if not tensor.isfinite().all()]:
        raise ValueError(
            f"{name}: '{path}' holds numbers that are not finite, in {', '.join(broken[:3])}; give a whole checkpoint"
        )
    return tokenizer, model.eval()


def _find_end(tokenizer: Any, config: Any, with_eos: bool | None, path: str | Path, name: str) -> int | None:
    """Returns the token that is put behind every text, None for texts as the tokenizer leaves them."""
    trained: int | None = getattr(config, SCORED_END, None)
    if with_eos is None and trained is None:
        if config.num_labels == 1 and _last_token(tokenizer) not in tokenizer.all_special_ids:
            _log.info(
                "%s: '%s' reads texts without end-of-text; where it learned with it, set %s_eos=True", name, path, name
            )
        return None
    if with_eos is False:
        return None
    end = tokenizer.eos_token_id if trained is None else trained
    if end is None:
        raise ValueError(f"{name}_eos: found True, but the tokenizer of '{path}' has no EOS token; leave it out")
    return end


def _last_token(tokenizer: Any) -> int:
    return tokenizer("a")["input_ids"][-1]


def _choose_padding(tokenizer: Any, config: Any, end: int | None) -> None:
    """Makes tokenizer and model pad with one token, in which no text ends: decoders are read at the last other one."""
    pad = config.pad_token_id
    if pad is None or pad == end:
        last = _last_token(tokenizer) if end is None else end
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, *range(config.vocab_size))
        pad = next(token for token in candidates if token not in (None, last))
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    config.pad_token_id = pad


def _longest(tokenizer: Any, model: Any) -> int | None:
    """Returns the most tokens that the classifier reads, None where nothing limits them."""
    limits = [tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or NO_LIMIT]
    for key, module in model.named_modules():
        # RoBERTa and its likes count positions from behind that of padding.
        if key.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limits.append(len(module.weight) - module.padding_idx - 1)
    return min(limits) if min(limits) < NO_LIMIT else None


def _find_column(config: Any, label: str | None, path: str | Path, name: str) -> int:
    if label is None:
        return -1
    known = {str(text): int(column) for column, text in config.id2label.items()}
    if label not in known:
        raise ValueError(f"{name}: '{path}' has no label {label!r}; its labels are {', '.join(known)}")
    return known[label]
