"""Options of environments: whom the model talks with, and how far a conversation may go."""

from dataclasses import dataclass

from realjax.core.option import check_ranges, option
from realjax.environments.environment import load_environment


@dataclass(frozen=True, kw_only=True)
class EnvironmentOptions:
    """Answers in turns: the model talks with an environment, which may give it tools and rewards."""

    path: str | None = option(
        None,
        "class <module>:<Class> with reset(prompt) and step(answer), such as "
        "realjax.environments.calculator:Calculator; null: a prompt is answered once",
    )
    max_turns: int = option(8, "answers in a conversation, each of gen.max_new_tokens at most", at_least=1, at_most=999)
    max_seqlen: int = option(
        1024,
        "tokens of a whole conversation; it ends where it has no room for another answer",
        at_least=2,
        at_most=2**24,
    )
    step_seconds: float = option(60.0, "time limit of a call of the environment, in seconds", above=0)
    max_retries: int = option(
        1, "how often a conversation is begun anew whose environment raises or takes too long", at_least=0, at_most=1000
    )
    num_threads: int = option(64, "calls of environments at once", at_least=1, at_most=4096)

    def __post_init__(self) -> None:
        check_ranges(self)

    def check(self, *, max_new_tokens: int) -> None:
        """Raises ValueError for a class that is not there, and for answers that never fit."""
        if self.path is None:
            return
        if max_new_tokens >= self.max_seqlen:
            raise ValueError(
                f"env.max_seqlen: found {self.max_seqlen} with gen.max_new_tokens={max_new_tokens}; a conversation "
                "needs room for a prompt and an answer at least: raise it, or lower gen.max_new_tokens"
            )
        load_environment(self.path)
