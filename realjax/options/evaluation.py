"""Options of answers that are measured, shown or kept: those to held-out prompts, and those of the training."""

from dataclasses import dataclass

from realjax.core.option import check_ranges, option


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Answers to held-out prompts, scored by the run's own rewards; greedy ones, sampled ones, or both."""

    greedy: bool = option(True, "answer with the likeliest tokens")
    sampled: bool = option(True, "answer with tokens drawn as in training")
    num_prompts: int | None = option(None, "prompts answered, from the start of valid_path; null is all", at_least=1)
    num_samples: int = option(
        1, "answers drawn as in training for each prompt; of several, pass@k is reported", at_least=1, at_most=2**16
    )
    success_above: float = option(0.5, "answers whose reward is above this solve their prompt, for pass@k")
    vote_fn: str | None = option(
        None,
        "function <module>:<function> of (prompts, answers, rows of the data) that returns what each answer votes for, "
        "such as realjax.rewards.verifiable:number_vote, for majority@k; null: no such metric",
    )
    best_metric: str | None = option(
        None,
        "metric of the evaluation, such as greedy/task_reward, whose highest value marks the checkpoint kept as best",
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.draws:
            raise ValueError("eval.greedy: found False, as is eval.sampled; set one of them to True")

    @property
    def draws(self) -> tuple[str, ...]:
        """How answers are drawn, one name for each way."""
        return tuple(name for name in ("greedy", "sampled") if getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class RolloutOptions:
    """What a run shows and keeps of the answers that it learns from."""

    log_freq_steps: int | None = option(
        10,
        "log some answers with their rewards after the first step and every so many, also for the report; null: none",
        at_least=1,
    )
    num_logged: int = option(
        3, "answers logged then, evenly from the lowest reward to the highest", at_least=1, at_most=1000
    )
    keep: bool = option(False, "write all answers, with their rewards, to rollouts/step<number>.jsonl.gz")

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Answers before and after a training that draws none by itself."""

    num_prompts: int = option(
        0,
        "prompts from the start of dataset.valid_path that the model answers greedily before the first step and after "
        "the last, for the report; it takes compiling, and memory for decoding; 0: none",
        at_least=0,
        at_most=1000,
    )
    max_new_tokens: int = option(128, "the longest answer then, in tokens", at_least=1, at_most=2**20)

    def __post_init__(self) -> None:
        check_ranges(self)
