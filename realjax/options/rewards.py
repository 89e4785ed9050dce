"""Options of rewards: where they come from, and what becomes of answers that cannot be scored."""

from dataclasses import dataclass

from realjax.core.option import check_ranges, option


@dataclass(frozen=True, kw_only=True)
class RewardOptions:
    """Rewards beside those of the model at rew.path; of several sources the weighted sum counts."""

    fn: str | None = option(
        None,
        "function <module>:<function> of (prompts, answers, rows of the data) that returns a number for each answer, "
        "such as realjax.rewards.verifiable:number_reward",
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
