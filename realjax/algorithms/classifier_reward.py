"""A HuggingFace sequence classifier as a reward: it reads texts with its own tokenizer, in PyTorch on the host."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from realjax.algorithms.text_rewards import Row, TextFn

# Some tokenizers give this kind of number for "no limit".
NO_LIMIT = 1_000_000


def load_classifier(
    path: str | Path, *, label: str | None = None, batch_size: int = 16, name: str = "reward.classifier"
) -> TextFn:
    """Returns the function whose reward is a classifier's logit, in float32, of the text prompt + answer.

    The logit is that of `label`, or the last one (of two labels the positive, of one the score). A text longer than the
    classifier can read loses its beginning. Raises ValueError, naming the option `name`, without PyTorch, for a
    directory that holds no classifier, and for a label that it has not.
    """
    if importlib.util.find_spec("torch") is None:
        raise ValueError(f"{name}: '{path}' needs PyTorch, which is not installed; run `pip install realjax[torch]`")
    import torch  # an extra, and slow to import

    tokenizer, model = _load(path, name)
    column = _find_column(model.config, label, path, name)
    limits = (tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or NO_LIMIT)
    longest = min(limits) if min(limits) < NO_LIMIT else None

    @torch.inference_mode()
    def score(prompts: Sequence[str], answers: Sequence[str], rows: Sequence[Row]) -> list[float]:
        texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        rewards = np.zeros(len(texts))
        # Neighbours in length share a batch, so that little of it is padding.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for first in range(0, len(order), batch_size):
            part = order[first : first + batch_size]
            options = {"truncation": longest is not None, "max_length": longest}
            inputs = tokenizer([texts[i] for i in part], padding=True, return_tensors="pt", **options)
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
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
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
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer, model.eval()


def _find_column(config: Any, label: str | None, path: str | Path, name: str) -> int:
    if label is None:
        return -1
    known = {str(text): int(column) for column, text in config.id2label.items()}
    if label not in known:
        raise ValueError(f"{name}: '{path}' has no label {label!r}; its labels are {', '.join(known)}")
    return known[label]
