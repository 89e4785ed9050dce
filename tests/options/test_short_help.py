"""The help of two screens, the search, and the names that people bring from elsewhere."""

import pytest

from realjax.apps.quickstart import EXPERIMENTS
from realjax.options.fields import list_options
from realjax.options.parsing import parse_overrides
from realjax.options.rl import GRPOConfig, PPOConfig
from realjax.options.short_help import describe_common, search_options
from realjax.options.supervised import DPOConfig, SFTConfig


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_help_fits_two_screens_of_eighty_columns(monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    cls = EXPERIMENTS[name].config_cls
    lines = describe_common(cls, name).splitlines()
    assert len(lines) <= 60 and all(len(line) <= 80 for line in lines)
    by_path = {option.path: option for option in list_options(cls)}
    shown = [line.split()[0] for line in lines if line.startswith("  ") and "=" not in line.split()[0]]
    known = {*by_path, *getattr(cls, "ALIASES", {}), *(p.replace(".gen.", ".") for p in by_path)}
    options = [word for word in shown if word in known]
    assert 14 <= len(options) <= 32


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_example_has_the_words_of_a_command(name):
    text = describe_common(EXPERIMENTS[name].config_cls, name)
    example = text.partition("For example:\n")[2].partition("\n\n")[0]
    words = [word for line in example.splitlines() for word in line.split() if "=" in word]
    config = parse_overrides(EXPERIMENTS[name].config_cls, words)
    config.check()
    assert words and any("dataset" in word for word in words)


def test_a_search_finds_names_and_meanings():
    found = search_options(PPOConfig, "ppo", "clip")
    assert "ppo.eps_clip=0.2" in found and "actor.optimizer.gradient_clipping" in found
    assert "lr_scheduler_type" not in found
    with pytest.raises(ValueError, match="--help nonsense: no option of ppo has it"):
        search_options(PPOConfig, "ppo", "nonsense")


MISTAKES = [
    (SFTConfig, "learning_rate=1e-5", "model.optimizer.lr"),
    (DPOConfig, "learning_rate=1e-6", "actor.optimizer.lr"),
    (SFTConfig, "per_device_train_batch_size=8", "dataset.train_bs_n_seqs"),
    (SFTConfig, "num_train_epochs=3", "exp_ctrl.total_train_epochs"),
    (SFTConfig, "model_name_or_path=m", "model.path"),
    (SFTConfig, "dataset_name=d", "dataset.train_path"),
    (SFTConfig, "max_length=512", "dataset.max_seqlen"),
    (SFTConfig, "gradient_accumulation_steps=4", "allocation.n_mbs"),
    (GRPOConfig, "num_generations=8", "group_size"),
    (GRPOConfig, "beta=0.04", "ppo.kl_ctl"),
    (GRPOConfig, "max_completion_length=256", "ppo.gen.max_new_tokens"),
    (GRPOConfig, "data.train_batch_size=64", "dataset.train_bs_n_seqs"),
    (GRPOConfig, "actor_rollout_ref.actor.optim.lr=1e-6", "actor.optimizer.lr"),
    (GRPOConfig, "actor_rollout_ref.rollout.n=5", "group_size"),
    (GRPOConfig, "actor_rollout_ref.actor.clip_ratio=0.2", "ppo.eps_clip"),
    (GRPOConfig, "trainer.total_epochs=2", "exp_ctrl.total_train_epochs"),
    (PPOConfig, "algorithm.kl_ctrl.kl_coef=0.1", "ppo.kl_ctl"),
]


@pytest.mark.parametrize(("cls", "word", "meant"), MISTAKES, ids=[word for _, word, _ in MISTAKES])
def test_names_of_trl_and_verl_are_answered_with_ours(cls, word, meant):
    with pytest.raises(ValueError, match=rf"unknown option .*did you mean {meant}\?"):
        parse_overrides(cls, [word])
