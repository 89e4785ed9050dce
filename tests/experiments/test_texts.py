"""What every experiment makes of texts: chats in their template, and checkpoints that name what ended the texts."""

import json

import pytest
from transformers import AutoTokenizer

from realjax.apps.quickstart import EXPERIMENTS
from realjax.core.end_tokens import EndTokens
from tests.given.checkpoints import edit_config
from tests.given.runs import LONGEST, PAIR, ROW, Given, build_spec, make_options
from tests.given.texts import write_jsonl

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %} and{% endif %}"


@pytest.fixture
def given(given_copy: Given) -> Given:
    """Models whose tokenizer ends texts with 0, while config.json names 5, and generation_config.json 5 and 7."""
    for model in (given_copy.language_model, given_copy.reward_model):
        edit_config(model, eos_token_id=5)
        (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    return given_copy


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_what_is_saved_names_the_end_of_its_training(experiment, given, tmp_path):
    spec = build_spec(experiment, make_options(experiment, given, tmp_path))
    if spec.answers is not None:
        assert spec.graph.mfcs[0].eos_ids == (0, 5, 7)
        return
    saved = {role.name for role in spec.roles.values() if role.optimizer is not None}
    assert saved and all(spec.roles[role].ends == EndTokens(ids=(0, 5, 7), pad=1) for role in saved)
    assert all(role.ends is None for role in spec.roles.values() if role.name not in saved)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_chats_are_read_by_all(experiment, given, tmp_path):
    options = make_options(experiment, given, tmp_path, dataset__use_chat_template=True)
    with pytest.raises(ValueError, match="^dataset.use_chat_template: the tokenizer .* has no chat template; set it"):
        build_spec(experiment, options)
    for model in (given.language_model, given.reward_model):
        (model / "chat_template.jinja").write_text(TEMPLATE)
    chat = [{"role": "system", "content": "the "}, {"role": "user", "content": "film"}]
    for path, row in ((given.rows, ROW), (given.pairs, PAIR), (given.labelled, {**ROW, "label": True})):
        write_jsonl(path, [row | {"prompt": chat}] * 8)
    spec = build_spec(experiment, options)
    tokens = spec.loader.batch(0)["tokens"][0]
    assert AutoTokenizer.from_pretrained(given.language_model).decode(tokens[:LONGEST]).startswith("the film and")
