"""The planner's options."""

from dataclasses import dataclass

from realjax.core.option import check_ranges, option


@dataclass(frozen=True, kw_only=True)
class PlannerConfig:
    """What search allocation, and the predictions of every run, go by. Raises ValueError on values out of range."""

    cluster: str | None = option(
        None,
        "what the machines can do: a cluster.json, such as `realjax profile` writes, or a name such as h100; null goes "
        "by the kind of accelerator that is found",
    )
    answer_tokens: float | None = option(
        None, "tokens of a mean answer to plan for; null plans for answers of the greatest length", at_least=1
    )
    answers_from: str | None = option(
        None, "log directory of an earlier run: answers are planned for that are as long as those of its last steps"
    )
    evaluations: int = option(
        20_000, "plans that a search may look at; more of them can only find a better one", at_least=1
    )
    seed: int = option(0, "seed of the search: the same one finds the same plan", at_least=0, at_most=2**32 - 1)
    replan: bool = option(
        False, "a run that continues is planned anew, for answers as long as it has had; else it keeps its plan"
    )
    update_cluster: bool = option(False, "write what the run's steps took back into the file of `cluster`")

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.answer_tokens is not None and self.answers_from is not None:
            raise ValueError("planner: answer_tokens and answers_from are both given; set one of them to null")
