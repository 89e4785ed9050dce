"""What `tools.bench.planner` measures: two models, and plans for two devices by experiment and name."""

import json
from collections.abc import Mapping
from pathlib import Path

from realjax.hf.families import config_to_hf
from realjax.models.config import ModelConfig
from tools.bench.data import write_tokenizer

Calls = Mapping[str, Mapping[str, object]]

# By name: layers, size, and size of the feed-forward.
SHAPES = {"small": (4, 256, 1024), "wide": (6, 384, 1536)}
HEAD_DIM = 64
VOCAB_SIZE = 4096

D2, T2, P2 = ({f"parallel.{name}_parallel_size": 2} for name in ("data", "model", "pipeline"))
ONE, OTHER = {"device_mesh": "NODE01:0"}, {"device_mesh": "NODE01:1"}
# Of `n_mbs` 2 or more, of pipeline stages too.
PLANS: Mapping[str, Mapping[str, Calls]] = {
    "sft": {
        "d2": {"allocation": D2},
        "p2": {"allocation": P2},
        "d2, 2 micro-batches": {"allocation": D2 | {"n_mbs": 2}},
        "t2": {"allocation": T2},
        "p2, 2 micro-batches": {"allocation": P2 | {"n_mbs": 2}},
    },
    "dpo": {
        "d2": {"actor_train": D2, "ref_inf": D2},
        "ref on one": {"actor_train": D2, "ref_inf": ONE},
        "t2, ref d2": {"actor_train": T2, "ref_inf": D2},
        "side by side": {"actor_train": ONE, "ref_inf": OTHER},
        "p2, ref p2": {"actor_train": P2, "ref_inf": P2},
    },
    "grpo": {
        "d2": {"actor_gen": D2, "rew_inf": D2, "ref_inf": D2, "actor_train": D2},
        "train t2": {"actor_gen": D2, "rew_inf": D2, "ref_inf": D2, "actor_train": T2},
        "gen on one": {"actor_gen": ONE, "rew_inf": D2, "ref_inf": D2, "actor_train": D2},
        "judges apart": {"actor_gen": D2, "rew_inf": ONE, "ref_inf": OTHER, "actor_train": D2},
        "train on one": {"actor_gen": D2, "rew_inf": OTHER, "ref_inf": OTHER, "actor_train": ONE},
    },
    "ppo": {
        "d2": dict.fromkeys(("actor_gen", "rew_inf", "ref_inf", "critic_inf", "actor_train", "critic_train"), D2),
        "all apart": {
            "actor_gen": D2, "rew_inf": ONE, "ref_inf": ONE, "critic_inf": OTHER,
            "actor_train": ONE, "critic_train": OTHER,
        },
        "train t2": {
            "actor_gen": D2, "rew_inf": D2, "ref_inf": D2, "critic_inf": D2, "actor_train": T2, "critic_train": T2,
        },
        "train apart": {
            "actor_gen": D2, "rew_inf": D2, "ref_inf": D2, "critic_inf": OTHER,
            "actor_train": ONE, "critic_train": OTHER,
        },
        "judges p2": {
            "actor_gen": D2, "rew_inf": P2, "ref_inf": P2, "critic_inf": P2, "actor_train": D2, "critic_train": D2,
        },
    },
}  # fmt: skip


def write_models(folder: Path) -> list[Path]:
    """Writes the configurations of the models, Llamas in float32, each with a tokenizer; returns their directories."""
    for name, (num_layers, hidden_size, ffn_size) in SHAPES.items():
        num_heads = hidden_size // HEAD_DIM
        config = ModelConfig(
            family="llama",
            vocab_size=VOCAB_SIZE,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_q_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=HEAD_DIM,
            ffn_size=ffn_size,
            max_positions=2048,
        )
        write_tokenizer(folder / name)
        (folder / name / "config.json").write_text(json.dumps(config_to_hf(config)))
    return [folder / name for name in SHAPES]
