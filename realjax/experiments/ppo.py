"""PPO: six calls on four models. The actor answers, three models judge, then actor and critic learn."""

from collections.abc import Sequence

import jax

from realjax.algorithms.ppo import CRITIC_INPUTS, make_advantages, make_critic_loss
from realjax.allocation.heuristic import place_ppo
from realjax.dataflow.run import RunSpec
from realjax.experiments.rl import Setup
from realjax.options.rl import PPOConfig

ROLES = {
    "actor_gen": "actor",
    "rew_inf": "rew",
    "ref_inf": "ref",
    "critic_inf": "critic",
    "actor_train": "actor",
    "critic_train": "critic",
}


def build(config: PPOConfig, devices: Sequence[jax.Device]) -> RunSpec:
    """Returns the run. Raises ValueError for data, models or layouts that cannot work, before anything is allocated."""
    setup = Setup(config, devices, ROLES, place_ppo)
    options = config.ppo.resolved()
    return setup.run_spec(
        "ppo",
        (
            setup.generate(),
            *setup.rewards(),
            *setup.references(),
            setup.infer("critic_inf", "values", "values"),
            setup.advantages(make_advantages(options)),
            setup.train_actor(),
            setup.train("critic_train", make_critic_loss(options), CRITIC_INPUTS),
        ),
    )
