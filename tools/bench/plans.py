"""The plans that `tools.bench.planner` measures, by experiment and name: options by call, for two devices."""

from collections.abc import Mapping

Calls = Mapping[str, Mapping[str, object]]

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
