"""PPO: six calls on four models. The actor answers, three models judge, then actor and critic learn."""

from realjax.algorithms.ppo import CRITIC_INPUTS, make_advantages, make_critic_loss
from realjax.dataflow.run import RunSpec
from realjax.experiments.rl import Setup
from realjax.options.rl import PPOConfig


def build(config: PPOConfig) -> RunSpec:
    """Returns the run. Raises ValueError for data or models that cannot work."""
    setup = Setup(config)
    options = config.ppo.resolved(config.staleness)
    return setup.run_spec(
        "ppo",
        (
            setup.generate(),
            *setup.rewards(),
            *setup.references(),
            setup.infer("critic_inf", "critic", "values", "values"),
            setup.advantages(make_advantages(options)),
            *setup.corrections(),
            setup.train_actor(),
            setup.train("critic", make_critic_loss(options), CRITIC_INPUTS),
        ),
    )
