"""Options of rewards: where they come from, and what becomes of answers that cannot be scored."""

from dataclasses import dataclass

from realjax.core.option import check_ranges, option
from realjax.rewards.functions import is_async, load_function
from realjax.rewards.scoring import ScoringParameters


@dataclass(frozen=True, kw_only=True)
class RewardOptions(ScoringParameters):
    """Rewards beside those of the model at rew.path; of several sources the weighted sum counts."""

    fn: str | None = option(
        None,
        "function <module>:<function> of (prompts, answers, rows of the data) that returns a number for each answer, "
        "or of (prompt, answer, row) that returns one, such as realjax.rewards.verifiable:number_reward",
    )
    classifier: str | None = option(
        None, "Hugging Face sequence classifier, which reads the texts with its own tokenizer; needs realjax[torch]"
    )
    classifier_label: str | None = option(None, "label whose logit is the reward; null is the last one")
    classifier_eos: bool | None = option(
        None, "end the classifier's texts with end-of-text; null does so where its config.json says that it learned so"
    )
    model_weight: float = option(1.0, "weight of the model at rew.path")
    fn_weight: float = option(1.0, "weight of fn")
    classifier_weight: float = option(1.0, "weight of classifier")
    max_failed_share: float = option(
        0.2,
        "answers that could not be scored are left out; the run ends where they are more than this share of a step's",
        at_least=0,
        at_most=1,
    )

    def __post_init__(self) -> None:
        check_ranges(self)

    def check(self) -> None:
        """Raises ValueError for a function that is not there, or that could not be kept to `timeout_s`."""
        if not self.fn:
            return
        fn = load_function(self.fn)
        if self.timeout_s is not None and not self.workers and not is_async(fn):
            raise ValueError(
                f"reward.timeout_s: found {self.timeout_s:g} with reward.workers=0, where nothing can stop {self.fn}; "
                "set reward.workers to 1 or more, or make it an `async def`"
            )
