"""Where the rewards of a run come from: functions and classifiers, loaded once, and the calls that ask them."""

from collections.abc import Sequence
from functools import partial

from transformers import PreTrainedTokenizerBase

from realjax.core.json_text import JsonObject
from realjax.dataflow.graph import Host, Inference
from realjax.experiments.environment import reward_source
from realjax.options.rl import RLConfig
from realjax.rewards.classifier import load_classifier
from realjax.rewards.failures import Failures
from realjax.rewards.functions import TextFn, check_row, load_function
from realjax.rewards.mix import (
    FAILED,
    MODEL_REWARD_INPUTS,
    RewardSource,
    make_model_reward,
    mix_rewards,
    mixed_inputs,
    mixed_outputs,
)
from realjax.rewards.scoring import Scorer, make_scorer, run_here
from realjax.rewards.text import TEXT_REWARD_INPUTS, gather_text_rewards, make_text_reward, read_text_reward

TEXT_REWARDS = "text_rewards"  # the call, and its key


class Judges:
    """The rewards of a run beside those of a model."""

    def __init__(self, config: RLConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises ValueError for functions and classifiers that are not there."""
        self.config, self.tokenizer, reward = config, tokenizer, config.reward
        self._functions: dict[str, TextFn] = {}  # by the option that names them
        self._scorers: dict[str, Scorer] = {}
        if reward.fn:
            self._functions["fn"] = fn = load_function(reward.fn)
            self._scorers["fn"] = make_scorer(fn, reward, path=reward.fn, name="reward.fn")
        if reward.classifier:
            options = {"label": reward.classifier_label, "with_eos": reward.classifier_eos}
            self._functions["classifier"] = fn = load_classifier(reward.classifier, **options)
            self._scorers["classifier"] = Scorer(fn, partial(run_here, fn))

    def __bool__(self) -> bool:
        return bool(self._functions)

    def _title(self, name: str) -> str:
        return f"reward.{name} {getattr(self.config.reward, name)}"

    def check_row(self, row: JsonObject, place: str) -> None:
        """Raises ValueError for a row that a reward says it cannot score."""
        for name, fn in self._functions.items():
            check_row(fn, row, place, name=self._title(name))

    def calls(
        self, rows: Sequence[JsonObject], model: Inference | None, title: str, *, max_failed_share: float
    ) -> tuple[Inference | Host, ...]:
        """Returns the calls that give every answer to prompts of these rows a reward.

        `model` computes the scores of a reward model, which errors call `title`. Above a share of failed answers the
        last call raises.
        """
        reward, algorithm, failures = self.config.reward, self.config.algorithm, Failures()
        sources: list[RewardSource] = []
        if model is not None:
            fn = make_model_reward(scaling=algorithm.reward_output_scaling, bias=algorithm.reward_output_bias)
            parts = {"inputs": MODEL_REWARD_INPUTS, "weight": reward.model_weight, "title": title}
            sources.append(RewardSource(name="model", fn=fn, **parts))
        for number, name in enumerate(self._scorers):
            parts = {"weight": getattr(reward, f"{name}_weight"), "title": self._title(name), "can_fail": True}
            fn = read_text_reward(TEXT_REWARDS, number)
            sources.append(RewardSource(name=name, fn=fn, inputs=(TEXT_REWARDS,), **parts))
        if self.config.env.path:
            sources.append(reward_source())
        mixed = Host(
            name="rewards",
            fn=mix_rewards(sources, max_failed_share=max_failed_share, failures=failures),
            inputs=mixed_inputs(sources),
            outputs=mixed_outputs(sources),
            metrics=(*(f"reward/{source.name}" for source in sources), FAILED),
        )
        return (*self._ask(rows, failures, max_failed_share), *([] if model is None else [model]), mixed)

    def _ask(self, rows: Sequence[JsonObject], failures: Failures, max_failed_share: float) -> tuple[Host, ...]:
        """Returns the call that asks functions and classifiers, where there are any, beside other calls."""
        if not self._scorers:
            return ()
        parts = {"tokenizer": self.tokenizer, "rows": rows, "failures": failures, "max_failed_share": max_failed_share}
        fns = [make_text_reward(scorer, name=self._title(name), **parts) for name, scorer in self._scorers.items()]
        failed = ("env_failed",) if self.config.env.path else ()
        return (
            Host(
                name=TEXT_REWARDS,
                fn=gather_text_rewards(fns, TEXT_REWARDS),
                inputs=(*TEXT_REWARD_INPUTS, *failed),
                outputs=(TEXT_REWARDS,),
                is_beside=True,
            ),
        )
