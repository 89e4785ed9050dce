"""What every experiment makes of texts: chats in their template, and checkpoints that name what ended the texts."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from realjax.apps.quickstart import EXPERIMENTS
from realjax.core.end_tokens import EndTokens
from tests.experiments.any_experiment import LONGEST, PAIR, ROW, Given, make_spec, options_of, write_given

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %} and{% endif %}"


@pytest.fixture
def given(tmp_path: Path) -> Given:
    """Models whose tokenizer ends texts with 0, while config.json names 5, and generation_config.json 5 and 7."""
    given = write_given(tmp_path / "given")
    for model in (given.language_model, given.reward_model):
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"eos_token_id": 5}))
        (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    return given


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_what_is_saved_names_the_end_of_its_training(experiment, given, tmp_path):
    spec = make_spec(experiment, options_of(experiment, given, tmp_path))
    if spec.answers is not None:
        assert spec.graph.mfcs[0].eos_ids == (0, 5, 7)
        return
    saved = {role.name for role in spec.roles.values() if role.optimizer is not None}
    assert saved and all(spec.roles[role].ends == EndTokens(ids=(0, 5, 7), pad=1) for role in saved)
    assert all(role.ends is None for role in spec.roles.values() if role.name not in saved)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_chats_are_read_by_all(experiment, given, tmp_path):
    options = options_of(experiment, given, tmp_path, dataset__use_chat_template=True)
    with pytest.raises(ValueError, match="^dataset.use_chat_template: the tokenizer .* has no chat template; set it"):
        make_spec(experiment, options)
    for model in (given.language_model, given.reward_model):
        (model / "chat_template.jinja").write_text(TEMPLATE)
    chat = [{"role": "system", "content": "the "}, {"role": "user", "content": "film"}]
    for name, row in (("rows", ROW), ("pairs", PAIR)):
        rows = [row | {"id": i, "prompt": chat} for i in range(8)]
        (given.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = make_spec(experiment, options)
    tokens = spec.loader.batch(0)["tokens"][0]
    assert AutoTokenizer.from_pretrained(given.language_model).decode(tokens[:LONGEST]).startswith("the film and")
