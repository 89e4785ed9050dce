"""ReaL's rules on machines of 8 devices, value by value; on all others, layouts that the models divide over."""

import dataclasses
from pathlib import Path

import pytest

from realjax.allocation.heuristic import place, place_grpo, place_ppo
from realjax.dataflow.run import RoleSpec
from realjax.models.config import ModelConfig

LLAMA_7B = ModelConfig(
    family="llama",
    vocab_size=32000,
    hidden_size=4096,
    num_layers=32,
    num_q_heads=32,
    num_kv_heads=32,
    head_dim=128,
    ffn_size=11008,
    max_positions=4096,
)
LLAMA_70B = dataclasses.replace(
    LLAMA_7B, hidden_size=8192, num_layers=80, num_q_heads=64, num_kv_heads=8, ffn_size=28672
)
# Nine heads and thirty layers: less divides.
SMALL = dataclasses.replace(
    LLAMA_7B, vocab_size=49152, hidden_size=576, num_layers=30, num_q_heads=9, num_kv_heads=3, ffn_size=1536
)
# A vocabulary that no tensor parallelism divides.
ODD_VOCABULARY = dataclasses.replace(LLAMA_7B, vocab_size=50257)


def models_of(actor=7, critic=7, config=LLAMA_7B, **configs):
    sizes = {"actor": actor, "ref": actor, "critic": critic, "rew": critic}
    return {
        role: RoleSpec(name=role, path=Path("nowhere"), size=size, config=configs.get(role, config))
        for role, size in sizes.items()
    }


def described(placements):
    """Call -> 'sizes @ first-last device'."""
    return {call: f"{p.strategy} @ {p.devices[0]}-{p.devices[-1]}" for call, p in placements.items()}


@pytest.mark.parametrize(("actor", "actor_train"), [(7, "d2p1m2+sp"), (13, "d1p1m4+sp"), (16, "d1p1m4+sp")])
@pytest.mark.parametrize(("critic", "critic_train"), [(1, "d2p1m2+sp"), (7, "d2p1m2+sp"), (8, "d1p1m4+sp")])
def test_ppo_on_one_node_of_eight(actor, actor_train, critic, critic_train):
    assert described(place_ppo(models_of(actor, critic), n_nodes=1, n_gpus_per_node=8)) == {
        "actor_gen": "d4p2m1 @ 0-7",
        "actor_train": f"{actor_train} @ 0-3",
        "ref_inf": "d2p1m4+sp @ 0-7",
        "rew_inf": "d2p1m2+sp @ 0-3",
        "critic_inf": "d2p1m2+sp @ 4-7",
        "critic_train": f"{critic_train} @ 4-7",
    }


@pytest.mark.parametrize(
    ("n_nodes", "actor", "critic", "actor_nodes"),
    [
        (2, 7, 7, 1),
        (2, 70, 7, 1),
        (3, 7, 7, 2),
        (4, 7, 70, 1),
        (4, 70, 7, 3),
        (4, 34, 34, 2),
        (2, 0, 0, 1),
        (4, 0, 0, 2),
    ],
)
def test_ppo_on_several_nodes_of_eight(n_nodes, actor, critic, actor_nodes):
    # 120 layers divide over any of these numbers of stages, and a hidden size of 8192 over two.
    config = dataclasses.replace(LLAMA_70B, num_layers=120)
    critic_nodes, rew_nodes = n_nodes - actor_nodes, -(-n_nodes // 2)
    last = 8 * n_nodes - 1
    assert described(place_ppo(models_of(actor, critic, config), n_nodes=n_nodes, n_gpus_per_node=8)) == {
        "actor_gen": f"d8p{n_nodes}m1 @ 0-{last}",
        "actor_train": f"d2p{actor_nodes}m4+sp @ 0-{8 * actor_nodes - 1}",
        "ref_inf": f"d2p{n_nodes}m4+sp @ 0-{last}",
        "rew_inf": f"d2p{rew_nodes}m4+sp @ 0-{8 * rew_nodes - 1}",
        "critic_inf": f"d2p{n_nodes - rew_nodes}m4+sp @ {8 * rew_nodes}-{last}",
        "critic_train": f"d2p{critic_nodes}m4+sp @ {8 * actor_nodes}-{last}",
    }


@pytest.mark.parametrize(
    ("n_nodes", "gen", "inference", "train"),
    [(1, "d4p2m1", "d2p2m2+sp", "d2p1m4"), (2, "d8p2m1", "d4p2m2+sp", "d2p2m4"), (4, "d8p4m1", "d4p4m2+sp", "d2p4m4")],
)
def test_grpo_uses_every_device_for_every_call(n_nodes, gen, inference, train):
    every = f"@ 0-{8 * n_nodes - 1}"
    assert described(place_grpo(models_of(), n_nodes=n_nodes, n_gpus_per_node=8)) == {
        "actor_gen": f"{gen} {every}",
        "ref_inf": f"{inference} {every}",
        "rew_inf": f"{inference} {every}",
        "actor_train": f"{train} {every}",
    }


@pytest.mark.parametrize("config", [LLAMA_7B, LLAMA_70B, SMALL, ODD_VOCABULARY], ids=["7b", "70b", "small", "vocab"])
@pytest.mark.parametrize("place", [place_ppo, place_grpo])
def test_any_machine_is_served_with_layouts_that_divide(place, config):
    for n_nodes in (1, 2, 3, 5):
        for n_gpus_per_node in (*range(1, 9), 16):
            machine = {"n_nodes": n_nodes, "n_gpus_per_node": n_gpus_per_node}
            placements = place(models_of(config=config), **machine)
            for call, placement in placements.items():
                strategy, devices = placement.strategy, placement.devices
                assert len(set(devices)) == len(devices) == strategy.size, (machine, call)
                assert set(devices) <= set(range(n_nodes * n_gpus_per_node))
                assert config.num_layers % strategy.pp == 0
                for dim in (config.num_q_heads, config.ffn_size, config.vocab_size):
                    assert dim % strategy.tp == 0
                if call.endswith("_train"):
                    assert config.hidden_size % strategy.dp == 0
                if strategy.sequence_parallel:
                    assert 32 % strategy.tp == 0 and strategy.tp > 1
            assert len(placements["actor_gen"].devices) == n_nodes * n_gpus_per_node
            assert placements["actor_gen"].strategy.tp == 1
            if place is place_ppo and n_nodes * n_gpus_per_node > 1:
                assert not set(placements["actor_train"].devices) & set(placements["critic_train"].devices)


def test_small_machines():
    def sizes(n_gpus_per_node, config=LLAMA_7B):
        placements = place_ppo(models_of(config=config), n_nodes=1, n_gpus_per_node=n_gpus_per_node)
        return described(placements)

    assert set(sizes(1).values()) == {"d1p1m1 @ 0-0"}
    assert sizes(2) == {
        "actor_gen": "d2p1m1 @ 0-1",
        "actor_train": "d1p1m1 @ 0-0",
        "ref_inf": "d2p1m1 @ 0-1",
        "rew_inf": "d1p1m1 @ 0-0",
        "critic_inf": "d1p1m1 @ 1-1",
        "critic_train": "d1p1m1 @ 1-1",
    }
    assert sizes(4) == {
        "actor_gen": "d2p2m1 @ 0-3",
        "actor_train": "d1p1m2+sp @ 0-1",
        "ref_inf": "d2p1m2+sp @ 0-3",
        "rew_inf": "d2p1m1 @ 0-1",
        "critic_inf": "d2p1m1 @ 2-3",
        "critic_train": "d1p1m2+sp @ 2-3",
    }
    # Three devices train: a hidden size of 4096 leaves one of them idle, 576 none.
    assert sizes(6)["actor_train"] == "d1p1m2+sp @ 0-1"
    assert sizes(6, SMALL)["actor_train"] == "d3p1m1 @ 0-2"


def test_models_that_are_not_there_have_no_calls():
    models = models_of()
    del models["ref"], models["rew"]
    assert set(place_ppo(models, n_nodes=1, n_gpus_per_node=8)) == {
        "actor_gen",
        "actor_train",
        "critic_inf",
        "critic_train",
    }
    assert set(place_grpo(models, n_nodes=1, n_gpus_per_node=8)) == {"actor_gen", "actor_train"}


@pytest.mark.parametrize("config", [LLAMA_7B, LLAMA_70B, SMALL, ODD_VOCABULARY], ids=["7b", "70b", "small", "vocab"])
def test_answers_drawn_beside_training_have_devices_of_their_own(config):
    models = models_of(config=config)
    for n_nodes, n_gpus_per_node in [(1, n) for n in (2, 3, 4, 8)] + [(2, 8), (3, 4)]:
        machine = {"n_nodes": n_nodes, "n_gpus_per_node": n_gpus_per_node}
        placements = place(models, **machine, is_apart=True)
        drawn, trained = (
            {device for call in calls for device in placements[call].devices}
            for calls in (("actor_gen", "ref_inf", "rew_inf"), ("actor_train", "critic_inf", "critic_train"))
        )
        assert not drawn & trained and drawn | trained <= set(range(n_nodes * n_gpus_per_node))
        for placement in placements.values():
            assert len(placement.devices) == placement.strategy.size
            assert config.vocab_size % placement.strategy.tp == 0 and config.num_q_heads % placement.strategy.tp == 0
    assert described(place(models_of(), n_nodes=1, n_gpus_per_node=8, is_apart=True)) == {
        "actor_gen": "d4p1m1 @ 4-7",
        "ref_inf": "d2p1m2+sp @ 4-7",
        "rew_inf": "d2p1m2+sp @ 4-7",
        "actor_train": "d1p1m2+sp @ 0-1",
        "critic_inf": "d1p1m2+sp @ 2-3",
        "critic_train": "d1p1m2+sp @ 2-3",
    }
    one = {"n_nodes": 1, "n_gpus_per_node": 1}
    assert place(models_of(), **one, is_apart=True) == place(models_of(), **one)


@pytest.mark.parametrize(("sizes", "role"), [((17, 7), "actor"), ((7, 70), "critic")])
def test_a_model_too_large_for_half_a_node_is_refused(sizes, role):
    with pytest.raises(
        ValueError, match=f"heuristic trains up to 16B .* {role}.type.size={max(sizes)}; set n_nodes to 2"
    ):
        place_ppo(models_of(*sizes), n_nodes=1, n_gpus_per_node=8)
    place_ppo(models_of(*sizes), n_nodes=2, n_gpus_per_node=8)
