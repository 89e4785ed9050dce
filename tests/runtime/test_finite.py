"""Numbers that are not finite are found wherever parameters lie, and whose they are is said."""

import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from realjax.core.axes import inference_rules, tree_shardings
from realjax.core.layout import Layout, ParallelStrategy
from realjax.core.optimizer_config import OptimizerConfig
from realjax.dataflow.run import RoleSpec
from realjax.engine.batching import Generation
from realjax.engine.optim import Optimizer
from realjax.hf.load import load_config, load_params
from realjax.models.build import build_model
from realjax.runtime.finite import nonfinite_leaves, refuse_nonfinite
from realjax.runtime.roles import Role, load_role
from tests.given.checkpoints import Tensors, edit_tensors


def poison(source: Path, directory: Path, name: str, value: float) -> Path:
    """Writes the checkpoint with one number of one tensor changed, the last one."""

    def change(tensors: Tensors) -> Tensors:
        tensors[name].reshape(-1)[-1] = value
        return tensors

    return edit_tensors(shutil.copytree(source, directory), change)


@pytest.mark.parametrize("memory_kind", [None, "pinned_host"])
@pytest.mark.parametrize("strategy", [ParallelStrategy(), ParallelStrategy(dp=2, tp=2)])
@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("lm_head.weight", np.nan, ["head/kernel"]),
        ("model.layers.1.mlp.down_proj.weight", -np.inf, ["layers/mlp/down/kernel"]),
        ("model.norm.weight", 3e38, []),
    ],
)
def test_one_number_among_all_is_found_wherever_it_lies(given, tmp_path, strategy, memory_kind, name, value, found):
    directory = poison(given.language_model, tmp_path / "bad", name, value)
    model, home = build_model(load_config(directory)), Layout.of(strategy)
    shardings = tree_shardings(model.axes, model.abstract, inference_rules(strategy), home, memory_kind)
    assert nonfinite_leaves(load_params(directory, model, shardings), home) == found


def role_at_home(spec: RoleSpec, *, is_offloaded: bool) -> Role:
    """Returns the role, built for one device."""
    optimizer = None if spec.optimizer is None else Optimizer(config=spec.optimizer, total_updates=1)
    home = Layout.of(ParallelStrategy())
    return Role(spec=spec, model=build_model(spec.config), home=home, optimizer=optimizer, is_offloaded=is_offloaded)


@pytest.mark.parametrize("kind", ["trained", "fixed", "offloaded", "critic"])
def test_no_role_is_loaded_with_one(given, tmp_path, kind):
    directory = poison(given.language_model, tmp_path / "bad", "model.embed_tokens.weight", np.nan)
    config = load_config(given.language_model)
    spec = RoleSpec(name="rew", path=directory, config=config.as_critic() if kind == "critic" else config)
    if kind == "trained":
        spec = replace(spec, optimizer=OptimizerConfig())
    role = role_at_home(spec, is_offloaded=kind == "offloaded")
    with pytest.raises(
        ValueError, match=r"^role rew \('.*bad'\) holds numbers that are not finite as float32, in embed"
    ):
        load_role(role, seed=1)
    good = replace(spec, path=given.language_model)
    state = load_role(role_at_home(good, is_offloaded=kind == "offloaded"), seed=1)
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(state))


def test_answers_of_logits_that_are_not_finite_are_refused():
    """With finite parameters too, whose products are not: the tokens drawn would mean nothing."""
    logprobs = [np.zeros(2, np.float32), np.array([-1.0, np.nan], np.float32), np.array([-np.inf], np.float32)]
    answers = [Generation(tokens=np.arange(len(one)), logprobs=one, ended=True, kept=None) for one in logprobs]
    refuse_nonfinite(answers[:1], "role actor ('here')")
    with pytest.raises(ValueError, match=r"^role actor \('here'\): its logits are not finite in 2 of 3 answers; give"):
        refuse_nonfinite(answers, "role actor ('here')")
