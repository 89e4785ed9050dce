"""GRPO: several answers to each prompt, judged against each other. No critic."""

from collections.abc import Sequence

import jax

from realjax.algorithms.grpo import make_advantages
from realjax.allocation.heuristic import place_grpo
from realjax.dataflow.run import RunSpec
from realjax.experiments.rl import Setup
from realjax.options.rl import GRPOConfig

ROLES = {"actor_gen": "actor", "rew_inf": "rew", "ref_inf": "ref", "actor_train": "actor"}


def build(config: GRPOConfig, devices: Sequence[jax.Device]) -> RunSpec:
    """Returns the run. Raises ValueError for data, models or layouts that cannot work, before anything is allocated."""
    setup = Setup(config, devices, ROLES, place_grpo)
    advantages = setup.advantages(make_advantages(config.ppo.resolved()))
    calls = (setup.generate(), *setup.rewards(), *setup.references(), advantages, setup.train_actor())
    return setup.run_spec("grpo", calls)
