"""Every experiment x every shared check: each refuses in words, before anything is on a device.

The cases are made from `EXPERIMENTS` and the models that an experiment's options have.
"""

import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import jax
import pytest

from realjax.apps.quickstart import EXPERIMENTS
from realjax.core.batch import BATCH_DIMS
from realjax.options.fields import list_options
from realjax.options.values import type_label
from tests.given.checkpoints import edit_config, edit_tensors, write_llama, write_reward_model
from tests.given.runs import GROUPS, Given, build_spec, list_models, make_options
from tests.given.texts import write_jsonl

ROLES = [(experiment, role) for experiment in EXPERIMENTS for role in list_models(experiment)]


def write_model(folder: Path, is_critic: bool, **changes) -> Path:
    return (write_reward_model if is_critic else write_llama)(folder / "odd", **changes)


def swap_two_tokens(folder: Path, is_critic: bool) -> Path:
    model = write_model(folder, is_critic)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    return model


def fewer_rows(folder: Path, is_critic: bool) -> Path:
    return write_model(folder, is_critic, vocab_size=256)


def few_positions(folder: Path, is_critic: bool) -> Path:
    return write_model(folder, is_critic, max_position_embeddings=4)


def another_head(folder: Path, is_critic: bool) -> Path:
    return write_model(folder, not is_critic)


def without_weights(folder: Path, is_critic: bool) -> Path:
    model = write_model(folder, is_critic)
    (model / "model.safetensors").unlink()
    return model


def torn_weights(folder: Path, is_critic: bool) -> Path:
    weights = write_model(folder, is_critic) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return weights.parent


def lacking_weights(folder: Path, is_critic: bool) -> Path:
    model = write_model(folder, is_critic)
    return edit_tensors(model, lambda tensors: {name: x for name, x in tensors.items() if "1.mlp.up" not in name})


def without_end(folder: Path, is_critic: bool) -> Path:
    model = write_model(folder, is_critic)
    edit_config(model, eos_token_id=None)
    file = model / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["eos_token"]
    file.write_text(json.dumps(config))
    return model


def wrong_value(folder: Path, is_critic: bool) -> Path:
    model = write_model(folder, is_critic)
    edit_config(model, vocab_size="320")
    return model


# Each makes the model that is wrong, and says what the message must hold after the option that names it.
MODELS: dict[str, tuple[Callable[[Path, bool], Path], str]] = {
    "vocabulary": (fewer_rows, r"{role}.path: the model has 256 tokens, but the tokenizer of '.*' has ids up to"),
    "positions": (few_positions, r"{role}.path: the longest .* tokens, but the model has 4 positions; lower "),
    "no weights": (without_weights, r"holds no weights; needed .*, or {role}.init_from_scratch=True for random ones"),
    "torn weights": (torn_weights, r"odd/model.safetensors' is not a whole safetensors file"),
    "lacking weights": (lacking_weights, r"odd': the checkpoint lacks 'model.layers.1.mlp.up_proj.weight'"),
    "config": (wrong_value, r"odd/config.json: vocab_size is '320'; it must be a whole number"),
}


def assert_refused(experiment: str, message: str, given: Given, root: Path, **changes) -> None:
    before = len(jax.live_arrays())
    with pytest.raises(ValueError, match=message):
        build_spec(experiment, make_options(experiment, given, root, **changes))
    assert len(jax.live_arrays()) == before
    assert {path.name for path in root.glob("*")} <= {".cache"}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_what_is_given_here_is_right_but_for_one_thing(experiment, given, tmp_path):
    """So that each case below is refused for its own reason."""
    build_spec(experiment, make_options(experiment, given, tmp_path / "root"))


@pytest.mark.parametrize("check", MODELS)
@pytest.mark.parametrize(("experiment", "role"), ROLES)
def test_a_model_that_does_not_fit(experiment, role, check, given, tmp_path):
    make, message = MODELS[check]
    model = make(tmp_path, list_models(experiment)[role])
    assert_refused(experiment, message.format(role=role), given, tmp_path / "root", **{f"{role}__path": model})


@pytest.mark.parametrize(("experiment", "role"), [(e, r) for e, r in ROLES if len(list_models(e)) > 1])
def test_a_model_that_reads_other_tokens(experiment, role, given, tmp_path):
    model = swap_two_tokens(tmp_path, list_models(experiment)[role])
    # Of the first model it is the others that read other tokens than the data's.
    message = r"^\w+.path: its tokenizer is not that of '.*' \(2 tokens differ\), so it would misread"
    assert_refused(experiment, message, given, tmp_path / "root", **{f"{role}__path": model})


@pytest.mark.parametrize(("experiment", "role"), ROLES)
def test_a_model_of_another_kind(experiment, role, given, tmp_path):
    """A trained critic may begin with a language model: it gets a new head, as docs/pairs.md says."""
    is_critic = list_models(experiment)[role]
    options = make_options(experiment, given, tmp_path / "root", **{f"{role}__path": another_head(tmp_path, is_critic)})
    is_trained = role in ("critic", "model")
    if is_critic and is_trained:
        build_spec(experiment, options)
        return
    needed = "has no scalar head, so it cannot score" if is_critic else "is a reward model or critic"
    with pytest.raises(ValueError, match=f"^{role}.path: '.*odd' {needed}"):
        build_spec(experiment, options)


@pytest.mark.parametrize(("experiment", "role"), ROLES)
def test_a_model_that_was_declared_to_be_another(experiment, role, given, tmp_path):
    message = f"^{role}.type._class: found qwen2, but '.*' holds a LlamaForCausalLM or its critic; set it to llama, or"
    assert_refused(experiment, message, given, tmp_path / "root", **{f"{role}__type___class": "qwen2"})


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_no_end_token(experiment, given, tmp_path):
    role, is_critic = next(iter(list_models(experiment).items()))
    model = without_end(tmp_path, is_critic)
    message = "no EOS token|names no end-of-text token"
    assert_refused(experiment, message, given, tmp_path / "root", **{f"{role}__path": model})


@pytest.mark.parametrize("name", ["experiment_name", "trial_name"])
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_names_that_are_no_directories(experiment, name, given, tmp_path):
    for value in ("../up", "a b", "\x1b[31mred", "bell\x07", "a\u202eb", "..", "x" * 300):
        assert_refused(experiment, f"^{name}: found ", given, tmp_path / "root", **{name: value})


@pytest.mark.parametrize("experiment", [name for name in EXPERIMENTS if name not in ("sft", "rw", "simpo", "orpo")])
def test_a_key_whose_dims_have_no_names(experiment, given, tmp_path, monkeypatch):
    key = list(build_spec(experiment, make_options(experiment, given, tmp_path / "root")).graph.producers)[-1]
    monkeypatch.delitem(BATCH_DIMS, key)
    assert_refused(experiment, f"^batch: the dims of key '{key}' have no names; enter", given, tmp_path / "root")


METRICS = [name for name, experiment in EXPERIMENTS.items() if hasattr(experiment.config_cls(), "eval")]


@pytest.mark.parametrize("experiment", METRICS)
def test_a_metric_that_no_evaluation_reports(experiment, given, tmp_path):
    options = {"dataset__valid_path": given.rows, "eval_freq_steps": 1}
    for name in ("greedy/task_reward", "sampled/reward/model", "greedy/eos_share"):
        build_spec(experiment, make_options(experiment, given, tmp_path / "root", **options, eval__best_metric=name))
    for name in ("greedy/task_rewards", "task_reward", "greedy/reward/fn", "greedy/kl"):
        message = f"^eval.best_metric: no evaluation reports '{name}'; (did you mean greedy/|there are greedy/)"
        assert_refused(experiment, message, given, tmp_path / "root", **options, eval__best_metric=name)


@pytest.mark.parametrize("experiment", METRICS)
def test_a_metric_of_one_of_several_sets(experiment, given, tmp_path):
    sets = {"dataset__valid_path": f"[some={given.rows},{given.prompts}]", "eval_freq_steps": 1}
    make = lambda name: make_options(experiment, given, tmp_path / "root", **sets, eval__best_metric=name)
    spec = build_spec(experiment, make("some/greedy/task_reward"))
    assert spec.evaluations.keys() == {"some", "prompts"} and spec.best_metric == "some/greedy/task_reward"
    build_spec(experiment, make("prompts/greedy/task_reward"))
    for name in ("greedy/task_reward", "other/greedy/task_reward"):
        with pytest.raises(ValueError, match=f"^eval.best_metric: no evaluation reports '{name}'"):
            build_spec(experiment, make(name))


@cache
def whole_numbers(experiment: str) -> list[str]:
    """Returns the options that are whole numbers."""
    options = list_options(EXPERIMENTS[experiment].config_cls)
    return [option.path for option in options if "int" in type_label(option.annotation).split()]


@pytest.mark.parametrize(
    "experiment", [pytest.param(name, marks=pytest.mark.slow) if name in GROUPS else name for name in EXPERIMENTS]
)
def test_huge_values_are_refused_at_once_or_do_no_harm(experiment, given, tmp_path):
    """By arithmetic: nothing is allocated for them, and an error is one line.

    The first experiment that has an option tries more values of it than the others do.
    """
    start, base = time.process_time(), make_options(experiment, given, tmp_path / "root")
    for option in whole_numbers(experiment):
        is_first = experiment == next(name for name in EXPERIMENTS if option in whole_numbers(name))
        for value in (10**7, 10**9, 2**31 - 1) if is_first else (2**31 - 1,):
            try:
                build_spec(experiment, {**base, option: value})
            except ValueError as error:
                assert len(str(error)) < 600 and "\n" not in str(error)
        for value in (2**32, 10**30, "9" * 5000) if is_first else (2**32,):
            with pytest.raises(ValueError, match=rf"{option.rpartition('.')[2]}: found .* (at most|between 0 and)"):
                build_spec(experiment, {**base, option: value})
    assert time.process_time() - start < 120


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_products_of_large_values_are_refused_by_arithmetic(experiment, given, tmp_path):
    """Each of them could be meant; together they are more than a run can count or hold."""
    options = make_options(experiment, given, tmp_path / "root")
    names = {name.rpartition(".")[2]: name for name in whole_numbers(experiment)}
    if experiment != "gen":
        kinds = [name for name in ("dataset.path", "dataset.train_path") if name in options]
        row = json.loads(options[kinds[0]].read_text().splitlines()[0])
        many = write_jsonl(tmp_path / "many.jsonl", ({**row, "id": i} for i in range(2000)))
        with pytest.raises(ValueError, match="^total_train_epochs: .* samples, but a run takes at most 134217728; set"):
            build_spec(experiment, {**options, kinds[0]: many, "total_train_epochs": 100_000})
    # Answers before and after a training are drawn on demand alone.
    if not names.get("max_new_tokens", "samples.").startswith("samples."):
        with pytest.raises(ValueError, match=r"max_new_tokens make .* positions; lower|tokens, but a step has at most"):
            build_spec(experiment, {**options, names["max_new_tokens"]: 2**30})


def without_tokenizer(folder: Path, is_critic: bool) -> Path:
    model = write_model(folder, is_critic)
    for file in model.glob("tokenizer*"):
        file.unlink()
    return model


@pytest.mark.parametrize(("experiment", "role"), [(e, r) for e, r in ROLES if r != next(iter(list_models(e)))])
def test_a_model_without_a_tokenizer_is_taken_to_read_the_same_tokens(experiment, role, given, tmp_path, caplog):
    model = without_tokenizer(tmp_path, list_models(experiment)[role])
    with caplog.at_level("INFO", "realjax.checks"):
        build_spec(experiment, make_options(experiment, given, tmp_path / "root", **{f"{role}__path": model}))
    assert f"{role}.path has no tokenizer: its tokens are taken to be those of" in caplog.text


@pytest.mark.parametrize(("experiment", "role"), ROLES)
def test_a_model_from_scratch_that_nothing_could_hold(experiment, role, given, tmp_path):
    model = write_model(tmp_path, list_models(experiment)[role])
    edit_config(model, hidden_size=2**30, num_attention_heads=2**20, num_key_value_heads=2**20, head_dim=1024)
    changes = {f"{role}__path": model, f"{role}__init_from_scratch": True}
    assert_refused(experiment, f"^{role}.path: '.*odd' describes a model of ", given, tmp_path / "root", **changes)
