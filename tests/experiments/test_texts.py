"""What every experiment makes of texts: chats in their template, and checkpoints that name what ended the texts."""

import dataclasses
import importlib
import json
import shutil
from typing import get_type_hints

import jax
import pytest
from transformers import AutoTokenizer

from realjax.apps.quickstart import EXPERIMENTS
from realjax.core.end_tokens import EndTokens
from realjax.dataflow.run import RunSpec
from realjax.options.checks import resolve_names, validate
from realjax.options.model import ModelTrainEvalConfig
from realjax.options.parsing import parse_overrides
from tests.e2e.builders import write_llama

ROW = {"prompt": "the film", "answer": " was good", "pos_answers": [" was good"], "neg_answers": [" was bad"]}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A Llama whose tokenizer ends texts with 0, while config.json names 5 and generation_config.json 5 and 7."""
    folder = tmp_path_factory.mktemp("inputs")
    model = write_llama(folder / "llama", eos_token_id=5, pad_token_id=0)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"id": i, **ROW}) + "\n" for i in range(4)))
    return model, rows


def build(name, inputs, root, **changes):
    """Returns the run of an experiment, whatever models and kind of data it has; `__` stands for a dot."""
    model, rows = inputs
    cls = EXPERIMENTS[name].config_cls
    hints = get_type_hints(cls)
    names = {field.name for field in dataclasses.fields(cls)}
    path = "path" if "path" in {field.name for field in dataclasses.fields(hints["dataset"])} else "train_path"
    options = {"fileroot": root, "mode": "local", "n_gpus_per_node": 1, "allocation_mode": "d1p1m1"}
    options |= {f"dataset.{path}": rows, "dataset.train_bs_n_seqs": 4}
    options |= {f"{role}.path": model for role in names - {"rew"} if hints[role] is ModelTrainEvalConfig}
    options |= {"reward.fn": "realjax.apps.demo_data:praise_reward"} if "reward" in names else {}
    generates = [group for group in (name, "ppo", "gen") if group in names]
    options |= {("gen" if group == "gen" else f"{group}.gen") + ".max_new_tokens": 8 for group in generates}
    options |= {key.replace("__", "."): value for key, value in changes.items()}
    config = resolve_names(parse_overrides(cls, [f"{key}={value}" for key, value in options.items()]), name)
    validate(config)
    return importlib.import_module(EXPERIMENTS[name].module).build(config, jax.devices()[:1])


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name != "gen"])
def test_what_is_saved_names_the_end_of_its_training(name, inputs, tmp_path):
    spec: RunSpec = build(name, inputs, tmp_path)
    saved = {role.name for role in spec.roles.values() if role.optimizer is not None}
    assert saved and all(spec.roles[role].ends == EndTokens(ids=(0, 5, 7), pad=1) for role in saved)
    assert all(role.ends is None for role in spec.roles.values() if role.name not in saved)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_reads_chats(name, inputs, tmp_path):
    with pytest.raises(ValueError, match="^dataset.use_chat_template: the tokenizer .* has no chat template; set it"):
        build(name, inputs, tmp_path, dataset__use_chat_template=True)
    model, _ = inputs
    chat = tmp_path / "chat"
    shutil.copytree(model, chat)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %} and{% endif %}"
    (chat / "chat_template.jinja").write_text(template)
    rows = tmp_path / "chats.jsonl"
    row = {**ROW, "prompt": [{"role": "system", "content": "the "}, {"role": "user", "content": "film"}]}
    rows.write_text("".join(json.dumps({"id": i, **row}) + "\n" for i in range(4)))
    spec = build(name, (chat, rows), tmp_path, dataset__use_chat_template=True)
    tokens = spec.prompts.example(0)["tokens"] if name == "gen" else spec.loader.batch(0)["tokens"][0]
    assert AutoTokenizer.from_pretrained(chat).decode(tokens).startswith("the film and")
