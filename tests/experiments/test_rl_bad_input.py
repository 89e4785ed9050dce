"""What a user can get wrong in a run of reinforcement learning is told in one line, before anything is on a device."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from tests.given.checkpoints import write_llama
from tests.given.runs import LAYOUTS, Given, build_rl_spec


def other_tokenizer(folder: Path) -> Path:
    """Two tokens have changed places, as far as an id can tell."""
    model = write_llama(folder / "other")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    return model


def smaller_vocabulary(folder: Path) -> Path:
    return write_llama(folder / "smaller", vocab_size=256)


def few_positions(folder: Path) -> Path:
    return write_llama(folder / "short", max_position_embeddings=12)


def language_model(folder: Path) -> Path:
    return write_llama(folder / "language-model")


# Each makes the model that is wrong, and says what the message must hold.
MODELS: dict[str, tuple[str, Callable[[Path], Path], dict[str, Any], str]] = {
    "tokenizer of the reward model": (
        "rew",
        other_tokenizer,
        {},
        r"^rew.path: its tokenizer is not that of '.*' \(2 tokens differ\).*; use a model of the same family; as "
        r"reward.classifier it would read the texts with its own$",
    ),
    "tokenizer of the critic": ("critic", other_tokenizer, {}, r"^critic.path: its tokenizer is not that of"),
    "vocabulary of the critic": (
        "critic",
        smaller_vocabulary,
        {},
        r"^critic.path: the model has 256 tokens, but the tokenizer of '.*' has ids up to 3\d\d .*; use a checkpoint",
    ),
    "vocabulary of the actor": (
        "actor",
        smaller_vocabulary,
        {},
        r"^actor.path: the model has 256 tokens, but the tokenizer of '.*' has ids up to 3\d\d .*; use a checkpoint",
    ),
    "vocabulary of the reference": ("ref", smaller_vocabulary, {}, r"^ref.path: the model has 256 tokens"),
    "positions of the reward model": (
        "rew",
        few_positions,
        {},
        r"^rew.path: the longest prompt and gen.max_new_tokens make 1\d tokens, but the model has 12 positions; lower",
    ),
    "a reward model without a head": (
        "rew",
        language_model,
        {"rew__init_from_scratch": False},
        r"^rew.path: '.*language-model' has no scalar head, so it cannot score answers; give a reward model",
    ),
}
CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "answers beyond the positions": (
        {"algo__gen__max_new_tokens": 125},
        r"^actor.path: the longest prompt and gen.max_new_tokens make 1\d\d tokens, but the model has 128 positions",
    ),
    "more minibatches than sequences": (
        {"algo__ppo_n_minibatches": 9},
        r"ppo_n_minibatches: found 9 for the 8 sequences of a step; set it to 8 or less",
    ),
    "replay of experts without any": (
        {"algo__routing_replay": True},
        r"^routing_replay: found True, but role actor \(.*\) has no experts to send tokens to; leave it out",
    ),
    "a router's loss without a router": (
        {"actor__router_z_loss_coef": 0.1},
        r"^actor.router_z_loss_coef: found 0.1, but '.*' holds a llama without experts; leave it out",
    ),
    "no such reward module": (
        {"reward__fn": "no_such_module:f"},
        r"^reward.fn: the module of 'no_such_module:f' cannot be found; install it, or add its folder to PYTHONPATH",
    ),
    "no such reward function": (
        {"reward__fn": "realjax.rewards.verifiable:f"},
        r"^reward.fn: 'realjax.rewards.verifiable:f' is no function",
    ),
    "rows that the reward cannot score": (
        {"reward__fn": "realjax.rewards.verifiable:number_reward"},
        r"^dataset.path: '.*prompts.jsonl' line 1: reward.fn realjax.rewards.verifiable:number_reward cannot score "
        r"this row: found the answer ' .*'; number_reward needs one with a number; mend the row, or remove it$",
    ),
    "no reward": ({"rew__path": None, "rew__init_from_scratch": None}, r"^rew.path: nothing given, and no other sour"),
    "a model too large for a node": (
        {"allocation_mode": "heuristic", "n_gpus_per_node": 8, "actor__type__size": 70},
        r"^allocation_mode: heuristic trains up to 16B parameters on half a node of 8 devices, but actor.type.size=70",
    ),
    "a mesh of another size": (
        {**LAYOUTS["halves"], "ref_inf.parallel.model_parallel_size": 1},
        r"^ref_inf.device_mesh: 'NODE01:0,1' has 2 devices, but ref_inf.parallel needs 1",
    ),
    "slots that the layout cannot share out": (
        {**LAYOUTS["data and tensor"], "algo__gen__num_slots": 3},
        r"^gen.num_slots: 3 answers at once cannot be divided over data x pipeline = 2 devices; use a multiple",
    ),
    "no held-out prompts": ({"eval_freq_steps": 1}, r"^dataset.valid_path: nothing given, but eval_freq_\* asks"),
}


@pytest.mark.parametrize("case", MODELS)
def test_models(case, given, tmp_path):
    role, make, changes, message = MODELS[case]
    assert_refused(given, tmp_path, message, **{f"{role}__path": make(tmp_path)}, **changes)


@pytest.mark.parametrize("case", CHANGES)
def test_options(case, given, tmp_path):
    changes, message = CHANGES[case]
    assert_refused(given, tmp_path, message, **changes)


def assert_refused(given: Given, root: Path, message: str, **changes: Any) -> None:
    """Fails unless the run is refused with this message, and nothing was put on a device."""
    before = len(jax.live_arrays())
    with pytest.raises(ValueError, match=message):
        build_rl_spec(given, root, **changes)
    assert len(jax.live_arrays()) == before


def test_what_is_given_here_is_right_but_for_that(given, tmp_path):
    """So that each case above is refused for its own reason."""
    spec = build_rl_spec(given, tmp_path)
    assert spec.loader.total_steps == 4
    assert list(spec.roles) == ["actor", "ref", "rew", "critic"]
