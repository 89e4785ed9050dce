"""ReMax: an answer to each prompt, judged against the greedy one. No critic."""

from collections.abc import Sequence

import jax

from realjax.algorithms.remax import make_advantages
from realjax.allocation.heuristic import place_grpo
from realjax.dataflow.run import RunSpec
from realjax.experiments.rl import Setup
from realjax.options.rl import ReMaxConfig

ROLES = {"actor_gen": "actor", "rew_inf": "rew", "ref_inf": "ref", "actor_train": "actor"}


def build(config: ReMaxConfig, devices: Sequence[jax.Device]) -> RunSpec:
    """Returns the run. Raises ValueError for data, models or layouts that cannot work, before anything is allocated."""
    setup = Setup(config, devices, ROLES, place_grpo)
    advantages = setup.advantages(make_advantages(config.remax.resolved()))
    calls = (setup.generate(has_baseline=True), *setup.rewards(), *setup.references(), advantages, setup.train_actor())
    return setup.run_spec("remax", calls)
