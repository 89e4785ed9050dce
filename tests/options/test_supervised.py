"""The quickstart's commands of reward modelling and DPO, word for word; their recipes; what a role must be."""

import dataclasses
import json
import shlex
from pathlib import Path

import pytest

from realjax.apps.recipe import read_config
from realjax.options.config_dict import from_config_dict, to_config_dict, to_json
from realjax.options.parallel import ParallelismConfig
from realjax.options.parsing import build, parse_overrides
from realjax.options.supervised import DPOConfig, RWConfig, SFTConfig

QUICKSTART_RW = shlex.split("""
    experiment_name=quickstart-rw \
    trial_name=release \
    mode=local \
    allocation_mode=manual \
    total_train_epochs=1 \
    save_freq_steps=5 eval_freq_epochs=1 \
    model.type._class=llama \
    model.type.size=7 \
    model.type.is_critic=True \
    model.path=/saved/sft/model/path \
    allocation.parallel.pipeline_parallel_size=2 \
    allocation.parallel.model_parallel_size=2 \
    allocation.parallel.data_parallel_size=2 \
    allocation.parallel.use_sequence_parallel=True \
    model.gradient_checkpointing=True \
    dataset.train_path=/path/to/train/dataset.jsonl \
    dataset.valid_path=/path/to/valid/dataset.jsonl \
    dataset.max_pairs_per_prompt=2 \
    dataset.max_seqlen=1024 \
    dataset.train_bs_n_seqs=512 \
    dataset.valid_bs_n_seqs=512
""")

QUICKSTART_DPO = shlex.split("""
    experiment_name=quickstart-dpo \
    trial_name=release \
    allocation_mode=manual \
    mode=local \
    total_train_epochs=2 \
    save_freq_steps=5 \
    actor.type._class=llama \
    actor.type.size=7 \
    actor.type.is_critic=False \
    actor.path=/saved/sft/model/path \
    actor_train.parallel.pipeline_parallel_size=1 \
    actor_train.parallel.model_parallel_size=4 \
    actor_train.parallel.data_parallel_size=2 \
    actor_train.parallel.use_sequence_parallel=True \
    ref.type._class=llama \
    ref.type.size=7 \
    ref.type.is_critic=False \
    ref.path=/saved/sft/model/path \
    ref_inf.parallel.pipeline_parallel_size=1 \
    ref_inf.parallel.model_parallel_size=2 \
    ref_inf.parallel.data_parallel_size=4 \
    ref_inf.parallel.use_sequence_parallel=True \
    dataset.train_path=/path/to/train/dataset.jsonl \
    dataset.max_pairs_per_prompt=2 \
    dataset.max_seqlen=1024 \
    dataset.train_bs_n_seqs=512 \
    dataset.valid_bs_n_seqs=512
""")
COMMANDS = {"rw": (RWConfig, QUICKSTART_RW), "dpo": (DPOConfig, QUICKSTART_DPO)}


def get(config, path):
    for name in path.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize("name", COMMANDS)
def test_the_quickstart_command_sets_what_it_says(name):
    config_cls, words = COMMANDS[name]
    config = parse_overrides(config_cls, words)
    for word in words:
        path, _, text = word.partition("=")
        value = get(config, config_cls.ALIASES.get(path, path))
        value = ",".join(value) if isinstance(value, tuple) else value
        assert type(value)(text) == value if not isinstance(value, bool) else text == str(value), path


def test_each_call_has_its_own_layout():
    config = parse_overrides(DPOConfig, QUICKSTART_DPO)
    sizes = {"use_sequence_parallel": True}
    assert config.actor_train.parallel == ParallelismConfig(model_parallel_size=4, data_parallel_size=2, **sizes)
    assert config.ref_inf.parallel == ParallelismConfig(model_parallel_size=2, data_parallel_size=4, **sizes)
    assert (config.beta, config.loss_type, config.label_smoothing, config.reference_free) == (0.1, "sigmoid", 0, False)


@pytest.mark.filterwarnings(r"ignore:the load_module\(\) method is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", COMMANDS)
def test_the_recipe_is_the_quickstart_command(name):
    config_cls, words = COMMANDS[name]
    recipe = Path(__file__).parents[2] / "configs" / f"{name}.py"
    paths = [f"--config.{word}" for word in words if "path=" in word]
    found = from_config_dict(config_cls, read_config(["launch", f"--config={recipe}", *paths]))
    assert found == parse_overrides(config_cls, words)


@pytest.mark.parametrize("name", COMMANDS)
def test_round_trips_give_an_equal_config(name):
    config_cls, words = COMMANDS[name]
    config = parse_overrides(config_cls, words)
    assert from_config_dict(config_cls, to_config_dict(config, experiment=name)) == config
    assert build(config_cls, json.loads(to_json(config))) == config


def test_older_spellings_are_accepted():
    config = parse_overrides(RWConfig, [*QUICKSTART_RW, "is_sft_lora=False", "sft_lora_path=null"])
    assert config == parse_overrides(RWConfig, QUICKSTART_RW)
    other = parse_overrides(RWConfig, ["model.type=qwen2-13-critic"])
    assert dataclasses.astuple(other.model.type) == ("qwen2", 13, True)
    from_actor = parse_overrides(RWConfig, ["model.type.is_critic=False", "model.init_critic_from_actor=True"])
    assert from_actor.model.is_critic


@pytest.mark.parametrize(
    ("config_cls", "words", "message"),
    [
        (RWConfig, ["model.type.is_critic=False"], "model.type.is_critic: found False; this model needs a scalar head"),
        (RWConfig, ["model.optimizer.type=empty"], "model.optimizer.type: found empty; this model is trained"),
        (RWConfig, ["is_sft_lora=True"], "sft_lora_path: found null with is_sft_lora=True; give the directory"),
        (DPOConfig, ["sft_lora_path=x"], "is_sft_lora: found False with sft_lora_path='x'; set it to True"),
        (DPOConfig, ["ref.lora.rank=4"], "ref.lora.rank: found 4; this model is not trained"),
        (
            SFTConfig,
            ["model.lora.merge=True"],
            "model.lora.rank: found 0, so there is no adapter for",
        ),
        (SFTConfig, ["model.lora.path=x", "model.lora.rank=4"], "model.lora.rank: found 4 with path='x'"),
        (DPOConfig, ["actor.type.is_critic=True"], "actor.type.is_critic: found True; this model needs a language"),
        (DPOConfig, ["ref.init_critic_from_actor=True"], "ref.type.is_critic: found False; .* a language model's head"),
        (DPOConfig, ["beta=0"], "beta: found 0.0; it must be above 0"),
        (DPOConfig, ["label_smoothing=0.5"], r"label_smoothing: found 0.5; it must be in \[0, 0.5\)"),
        (DPOConfig, ["loss_type=hinge"], "loss_type: found .*hinge"),
        (SFTConfig, ["model.type.is_critic=True"], "model.type.is_critic: found True"),
        (DPOConfig, ["dataset.max_pairs_per_prompt=0"], "dataset.max_pairs_per_prompt: found 0"),
    ],
)
def test_what_no_run_can_be_is_refused(config_cls, words, message):
    with pytest.raises(ValueError, match=message):
        parse_overrides(config_cls, words)


def test_a_reference_needs_no_optimizer():
    assert parse_overrides(DPOConfig, ["ref.optimizer.type=empty"]).ref.optimizer.type == "empty"
