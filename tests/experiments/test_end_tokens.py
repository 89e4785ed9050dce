"""Every experiment's checkpoints name the token that its data end with, whatever the source's files say."""

import dataclasses
import importlib
import json
from typing import get_type_hints

import jax
import pytest

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


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name != "gen"])
def test_what_is_saved_names_the_end_of_its_training(name, inputs, tmp_path):
    model, rows = inputs
    cls = EXPERIMENTS[name].config_cls
    hints = get_type_hints(cls)
    names = {field.name for field in dataclasses.fields(cls)}
    roles = [role for role in names - {"rew"} if hints[role] is ModelTrainEvalConfig]
    path = "path" if "path" in {field.name for field in dataclasses.fields(hints["dataset"])} else "train_path"
    reward = ["reward.fn=realjax.apps.demo_data:praise_reward"] if "reward" in names else []
    words = [f"fileroot={tmp_path}", "mode=local", "n_gpus_per_node=1", "allocation_mode=d1p1m1", *reward]
    words += [f"dataset.{path}={rows}", "dataset.train_bs_n_seqs=4", *(f"{role}.path={model}" for role in roles)]
    words += ["ppo.gen.max_new_tokens=8"] if "ppo" in names else []
    words += [f"{name}.gen.max_new_tokens=8"] if name in names - {"ppo"} else []
    config = resolve_names(parse_overrides(cls, words), name)
    validate(config)
    spec: RunSpec = importlib.import_module(EXPERIMENTS[name].module).build(config, jax.devices()[:1])
    saved = {role.name for role in spec.roles.values() if role.optimizer is not None}
    assert saved and all(spec.roles[role].ends == EndTokens(ids=(0, 5, 7), pad=1) for role in saved)
    assert all(role.ends is None for role in spec.roles.values() if role.name not in saved)
