"""Answers in turns: the conversations of a generate call with an environment, and their limits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from realjax.core.json_text import JsonObject
from realjax.data.turns import TurnTemplate
from realjax.environments.environment import Environment
from realjax.environments.tools import HERMES, ToolFormat

# Keys that such a call adds to a rollout's own.
TURN_KEYS = ("turn_rewards", "num_turns", "num_retries", "env_failed")


@dataclass(frozen=True, kw_only=True, eq=False)
class Turns:
    """How rows are continued in turns: the environment's class, what it is given, and how far a row may go."""

    make_fn: Callable[[], Environment]  # one for each row
    rows: Sequence[JsonObject]  # the data's, by prompt_id
    template: TurnTemplate
    tool_format: ToolFormat = HERMES
    max_turns: int = 8
    max_tokens: int = 2048  # of a whole row; one without room for another answer ends there
    step_seconds: float = 60.0
    num_threads: int = 64
    max_retries: int = 1  # of a row, from its beginning
    max_failed_share: float = 1.0  # of a step's rows; where more fail, the run ends

    def make(self, seed: int) -> Environment:
        """Returns the environment of a row."""
        environment = self.make_fn()
        environment.seed, environment.tool_format = seed, self.tool_format
        return environment
