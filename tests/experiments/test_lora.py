"""Adapters in runs that options describe: all experiments train them, and what one run saves the next reads."""

from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from realjax.core.trees import flatten_paths
from realjax.hf.adapters import has_head, load_adapters, merge_adapters, with_adapters
from realjax.hf.load import load_config, load_params
from realjax.models.build import build_model, make_fill
from realjax.runtime.ahead import Ahead
from realjax.runtime.executor import Executor
from tests.given.compare import assert_bitwise_equal
from tests.given.models import on_one_device
from tests.given.runs import Given, build_rl_spec, build_spec, load_executor, make_options, write_given
from tests.given.specs import run_here

CONSTANT = {"optimizer.lr": 0.01, "optimizer.lr_scheduler_type": "constant", "optimizer.warmup_steps_proportion": 0.0}


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Given:
    return write_given(tmp_path_factory.mktemp("given"))


def run(experiment: str, given: Given, root: Path, model: str, **changes) -> Path:
    """Carries out a run; returns the directory of its last checkpoint."""
    own = {f"{model}.{name}": value for name, value in CONSTANT.items()} | {f"{model}.lora.rank": 3}
    assert run_here(build_spec(experiment, make_options(experiment, given, root) | own | changes)) == 0
    return max(root.rglob("adapter_model.safetensors"), key=lambda path: path.stat().st_mtime).parent


@pytest.fixture(scope="module")
def adapters(given, quick, tmp_path_factory) -> dict[str, Path]:
    """What sft has saved, and a reward model's adapters of the same weights."""
    headless = {"model.path": given.language_model, "model.init_critic_from_actor": True}
    return {
        "sft": run("sft", given, tmp_path_factory.mktemp("sft"), "model"),
        "rw": run("rw", given, tmp_path_factory.mktemp("rw"), "model", **headless),
    }


def merged(base: Path, adapter: Path) -> dict:
    """Returns the dense parameters by path."""
    config, fresh = load_config(base), None
    if has_head(adapter):
        config, fresh = config.as_critic(), {"head/kernel": make_fill("head/kernel", (config.hidden_size, 1), 0)}
    plain, model = build_model(config), build_model(with_adapters(config, adapter))
    lora = model.config.lora
    assert lora is not None
    found = load_adapters(adapter, model, on_one_device(model))
    return flatten_paths(merge_adapters(load_params(base, plain, on_one_device(plain), fresh=fresh), found, lora))


def take_step(executor: Executor) -> None:
    executor.step(executor.plan.loader.batch(0), 0)


def test_a_run_that_continues_ends_bitwise_as_one_that_did_not_stop(given, quick, tmp_path):
    options = {"dataset.train_bs_n_seqs": 2, "recover_mode": "auto"}
    whole = run("sft", given, tmp_path / "whole", "model", **options)
    run("sft", given, tmp_path / "halves", "model", **options, max_steps=2)
    halves = run("sft", given, tmp_path / "halves", "model", **options)
    assert whole.name == halves.name and halves.name.endswith("globalstep4")
    assert_bitwise_equal(*(load_file(path / "adapter_model.safetensors") for path in (halves, whole)))


@pytest.mark.parametrize("experiment", ["dpo", "kto", "grpo"])
def test_a_step_trains_adapters_beside_the_reference(experiment, given, quick, tmp_path):
    changes = {"actor.lora.rank": 3, "actor.optimizer.lr": 0.01, "actor.optimizer.warmup_steps_proportion": 0.0}
    executor = load_executor(build_spec(experiment, make_options(experiment, given, tmp_path) | changes))
    before = jax.tree.map(np.asarray, flatten_paths(executor.own_params("actor")))
    base, ref = (flatten_paths(executor.bases.at_home(executor.roles[name])) for name in ("actor", "ref"))
    assert executor.states["ref"] == {} and all(ref[path] is base[path] for path in ref)
    take_step(executor)
    after = flatten_paths(executor.own_params("actor"))
    assert before.keys() == after.keys() and all(path.rpartition("/")[2].startswith("lora_") for path in after)
    assert any((before[path] != np.asarray(after[path])).any() for path in after) or experiment == "grpo"


@pytest.mark.parametrize("experiment", ["simpo", "orpo", "distill", "rloo", "remax", "reinforce_pp", "ahead"])
def test_adapters_alone_are_trained_in_every_experiment(experiment, given, quick, tmp_path):
    """`ahead`: of GRPO whose answers are drawn beside training."""
    is_ahead, role = experiment == "ahead", "actor"
    changes = {"actor__lora__rank": 3, "actor__optimizer__lr": 0.01}
    if experiment in ("simpo", "orpo", "distill"):
        executor = load_executor(build_spec(experiment, make_options(experiment, given, tmp_path, **changes)))
    else:
        group = {"ahead": "grpo"}.get(experiment, experiment)
        executor = load_executor(build_rl_spec(given, tmp_path, group, staleness=int(is_ahead), **changes))
    before = jax.tree.map(np.asarray, flatten_paths(executor.own_params(role)))
    base = flatten_paths(jax.tree.map(np.asarray, executor.bases.at_home(executor.roles[role])))
    loader = executor.plan.loader
    step = Ahead(executor, loader, 2).step if is_ahead else lambda step: executor.step(loader.batch(step), step)
    for number in range(2):
        step(number)
    after = flatten_paths(executor.own_params(role))
    assert before.keys() == after.keys() and all(path.rpartition("/")[2].startswith("lora_") for path in after)
    assert any((before[path] != np.asarray(after[path])).any() for path in after)
    assert_bitwise_equal(flatten_paths(executor.bases.at_home(executor.roles[role])), base)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_that_peft_made_is_trained_on(given, quick, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(given.language_model)
    own = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    peft.get_peft_model(theirs, own).save_pretrained(tmp_path / "theirs")
    changes = {f"model.{name}": value for name, value in CONSTANT.items()} | {"model.lora.path": tmp_path / "theirs"}
    assert run_here(build_spec("sft", make_options("sft", given, tmp_path / "run") | changes)) == 0
    (saved,) = (tmp_path / "run").rglob("adapter_model.safetensors")
    before, after = load_file(tmp_path / "theirs" / "adapter_model.safetensors"), load_file(saved)
    assert before.keys() == after.keys() and all((before[name] != after[name]).any() for name in after)
    again = transformers.AutoModelForCausalLM.from_pretrained(given.language_model)
    assert peft.PeftModel.from_pretrained(again, saved.parent).peft_config["default"].r == 2


def test_an_adapter_is_what_a_run_begins_with(given, quick, adapters, tmp_path):
    options = make_options("sft", given, tmp_path, model__lora__path=adapters["sft"])
    executor = load_executor(build_spec("sft", options))
    model = executor.roles["default"].model
    found = load_adapters(adapters["sft"], model, on_one_device(model))
    assert_bitwise_equal(executor.own_params("default"), found)
    assert any(np.asarray(leaf).any() for path, leaf in flatten_paths(found).items() if path.endswith("lora_b"))


@pytest.mark.parametrize("rank", [None, 3])
def test_models_that_were_fine_tuned_with_adapters_are_actor_and_reference(rank, given, quick, adapters, tmp_path):
    changes = {"is_sft_lora": True, "sft_lora_path": adapters["sft"], "actor.lora.rank": rank or 0}
    executor = load_executor(build_spec("dpo", make_options("dpo", given, tmp_path) | changes))
    expected = merged(given.language_model, adapters["sft"])
    for role in ("actor", "ref"):
        params = flatten_paths(executor.params(role))
        assert_bitwise_equal({path: params[path] for path in expected}, expected)
    assert (executor.states["ref"] == {}) == (rank is not None)


def test_a_reward_model_that_is_adapters_scores_for_ppo(given, quick, adapters, tmp_path):
    path = given.language_model
    own = {"rew__path": path, "critic__path": path, "actor__path": path, "ref__path": path}
    changes = {"rew__init_from_scratch": None, "critic__init_critic_from_actor": None, "is_rew_lora": True}
    executor = load_executor(build_rl_spec(given, tmp_path, **own, **changes, rew_lora_path=adapters["rw"]))
    head = load_file(adapters["rw"] / "adapter_model.safetensors")["base_model.model.score.weight"].T
    expected = merged(path, adapters["rw"])
    for role in ("rew", "critic"):
        params = flatten_paths(executor.params(role))
        np.testing.assert_array_equal(np.asarray(params.pop("head/kernel")), head)
        assert_bitwise_equal(params, {name: leaf for name, leaf in expected.items() if name in params})


def test_actor_critic_and_reward_model_lie_beside_one_base(given, quick, adapters, tmp_path):
    path = given.language_model
    own = {"rew__path": path, "critic__path": path, "actor__path": path, "ref__path": path}
    ranks = {"actor__lora__rank": 3, "critic__lora__rank": 2, "rew__lora__path": adapters["rw"]}
    spec = build_rl_spec(given, tmp_path, **own, **ranks, rew__init_from_scratch=None)
    executor = load_executor(spec)
    bases = {name: flatten_paths(executor.bases.at_home(role)) for name, role in executor.roles.items()}
    trunk = bases["rew"].keys()
    assert "head/kernel" not in trunk and len({role.spec.base for role in executor.roles.values()}) == 1
    assert all(bases[name][leaf] is bases["actor"][leaf] for name in bases for leaf in trunk)
    take_step(executor)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"actor.lora.path": "nowhere"}, "actor.lora.path: 'nowhere' is no directory"),
        ({"actor.lora.rank": 2, "ref.offload": True}, "ref.offload: its parameters are those that adapters of another"),
        ({"actor.lora.rank": 2, "ppo.ref_ema_eta": 0.1}, "ref_ema_eta: ref is to follow actor, which has adapters"),
        ({"actor.lora.rank": 2, "actor.lora.targets": "[q,q]"}, "actor.lora.targets: found q q; .* each once"),
    ],
)
def test_what_cannot_be_is_refused_before_a_device_is_used(changes, message, given, tmp_path):
    from realjax.experiments.checks import check_run

    with pytest.raises(ValueError, match=message):
        check_run(build_spec("ppo", make_options("ppo", given, tmp_path) | changes))
