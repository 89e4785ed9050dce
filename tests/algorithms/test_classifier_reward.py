"""A classifier's reward is its own logit of prompt + answer, whatever is scored beside it."""

import importlib.util

import numpy as np
import pytest

from realjax.algorithms.classifier_reward import load_classifier
from tests.algorithms.text_rollouts import SAMPLES
from tests.data.test_datasets import make_tokenizer
from tests.hf.tiny import SIZES

torch = pytest.importorskip("torch")
import transformers  # noqa: E402 - needs torch for its models

PROMPTS, ANSWERS = [prompt for _, prompt, _, _ in SAMPLES], [answer for _, _, answer, _ in SAMPLES]
LABELS = {0: "bad", 1: "good"}


def save_classifier(directory, *, num_labels=2, cls: type = transformers.LlamaForSequenceClassification, **tokenizer):
    torch.manual_seed(0)
    options: dict = {**SIZES, "vocab_size": 320, "num_hidden_layers": 1, "num_labels": num_labels}
    if num_labels == 2:
        options |= {"id2label": LABELS, "label2id": {text: column for column, text in LABELS.items()}}
    cls(transformers.LlamaConfig(**options)).save_pretrained(directory)
    make_tokenizer(**tokenizer).save_pretrained(directory)
    return directory


def their_logits(directory, text):
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory)
    with torch.inference_mode():
        return model(**tokenizer(text, return_tensors="pt")).logits[0].numpy()


@pytest.mark.parametrize(("num_labels", "label", "column"), [(2, None, 1), (2, "bad", 0), (1, None, 0)])
def test_the_reward_is_one_logit_whatever_the_batch(tmp_path, num_labels, label, column):
    directory = save_classifier(tmp_path, num_labels=num_labels)
    expected = [their_logits(directory, prompt + answer)[column] for prompt, answer in zip(PROMPTS, ANSWERS)]
    assert len(set(expected)) > 1
    for batch_size in (1, 3):
        found = load_classifier(directory, label=label, batch_size=batch_size)(PROMPTS, ANSWERS, [{}] * 4)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_long_text_loses_its_beginning(tmp_path):
    directory = save_classifier(tmp_path, model_max_length=16)
    score = load_classifier(directory)
    ending = "the film was good " * 10
    one, other, another = score(["bad " * 100, "good " * 50, ""], [ending, ending, "the film"], [{}] * 3)
    assert one == pytest.approx(other)
    assert one != pytest.approx(another)


def test_a_language_model_is_refused(tmp_path):
    save_classifier(tmp_path, cls=transformers.LlamaForCausalLM)
    with pytest.raises(ValueError, match="reward.classifier: .* lacks the weights score.weight; it needs a model"):
        load_classifier(tmp_path)


def test_other_mistakes_are_told_before_anything_is_scored(tmp_path, monkeypatch):
    directory = save_classifier(tmp_path / "model")
    with pytest.raises(ValueError, match="has no label 'fine'; its labels are bad, good"):
        load_classifier(directory, label="fine")
    with pytest.raises(ValueError, match="is no sequence classifier that transformers can load"):
        load_classifier(tmp_path / "nowhere")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs PyTorch, which is not installed; run `pip install realjax\[torch\]`"):
        load_classifier(directory)
