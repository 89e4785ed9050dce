"""A classifier's reward is its own logit of prompt + answer, whatever is scored beside it."""

import importlib.util

import numpy as np
import pytest

from realjax.rewards.classifier import load_classifier
from tests.given.checkpoints import Tensors, edit_config, edit_tensors
from tests.given.models import SIZES
from tests.given.texts import make_tokenizer
from tests.rewards.text_rollouts import SAMPLES

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


@pytest.mark.parametrize("own", [None, "<s>", "</s>"])
@pytest.mark.parametrize("special", ["", "bos", "bos eos"])
def test_a_reward_model_of_ours_reads_the_end_that_it_was_trained_on(tmp_path, special, own):
    """The score that training gave: at end-of-text, in any batch, whatever the tokenizer pads with."""
    directory = save_classifier(tmp_path, num_labels=1, special=special, pad_token=own)
    edit_config(directory, scored_end_token_id=1, pad_token_id=None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory)
    expected = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        ids = tokenizer(prompt + answer)["input_ids"]
        tokens = torch.tensor([ids if ids[-1] == 1 else [*ids, 1]])
        with torch.inference_mode():
            expected.append(model(tokens).logits.item())
    for batch_size in (1, 4):
        score = load_classifier(directory, batch_size=batch_size)
        np.testing.assert_allclose(score(PROMPTS, ANSWERS, [{}] * 4), expected, atol=1e-5)
    if special == "":
        without = load_classifier(directory, with_eos=False)(PROMPTS, ANSWERS, [{}] * 4)
        assert np.abs(np.subtract(without, expected)).min() > 1e-3
        edit_config(directory, scored_end_token_id=None, pad_token_id=1)
        asked = load_classifier(directory, with_eos=True)(PROMPTS, ANSWERS, [{}] * 4)
        np.testing.assert_allclose(asked, expected, atol=1e-5)


def test_a_text_keeps_its_end_when_it_loses_its_beginning(tmp_path):
    directory = save_classifier(tmp_path, num_labels=1, model_max_length=16)
    edit_config(directory, scored_end_token_id=1)
    ids = make_tokenizer()("bad " * 100)["input_ids"][-15:]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory)
    with torch.inference_mode():
        expected = model(torch.tensor([[*ids, 1]])).logits.item()
    assert load_classifier(directory)(["bad " * 50], ["bad " * 50], [{}]) == pytest.approx([expected], abs=1e-5)


def test_roberta_reads_fewer_tokens_than_its_table_has_rows(tmp_path):
    """Its positions begin behind that of padding: a text that is too long loses its beginning here too."""
    options = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    config = transformers.RobertaConfig(vocab_size=320, max_position_embeddings=66, num_labels=1, **options)
    torch.manual_seed(0)
    transformers.RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    make_tokenizer("bos eos").save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, truncation_side="left")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    text = "the film was so long " * 30
    with torch.inference_mode():
        expected = model(**tokenizer(text, truncation=True, max_length=64, return_tensors="pt")).logits.item()
    assert load_classifier(tmp_path)([text], [""], [{}]) == pytest.approx([expected], abs=1e-6)


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    directory = save_classifier(tmp_path)

    def spoil(tensors: Tensors) -> Tensors:
        tensors["score.weight"][0, 0] = np.nan
        return tensors

    edit_tensors(directory, spoil)
    with pytest.raises(ValueError, match=r"reward.classifier: '.*' holds numbers that are not finite, in score.weight"):
        load_classifier(directory)


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
