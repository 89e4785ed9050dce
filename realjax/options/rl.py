"""Options of reinforcement learning, one class for each algorithm."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from realjax.algorithms.grpo import GRPOParameters
from realjax.algorithms.policy import PolicyParameters
from realjax.algorithms.ppo import PPOParameters
from realjax.algorithms.reinforce_pp import ReinforcePPParameters
from realjax.algorithms.remax import ReMaxParameters
from realjax.algorithms.rloo import RLOOParameters
from realjax.core.option import nested, option
from realjax.options.common import CommonExperimentConfig
from realjax.options.datasets import PromptOnlyDatasetConfig
from realjax.options.environment import EnvironmentOptions
from realjax.options.evaluation import EvaluationOptions, RolloutOptions
from realjax.options.generation import GenerationOptions, check_samples_differ
from realjax.options.lora import RLAdapterOptions
from realjax.options.model import ModelFamily, ModelTrainEvalConfig
from realjax.options.parallel import MFCConfig
from realjax.options.rewards import RewardOptions
from realjax.options.supervised import check_role
from realjax.rewards.functions import load_function


@dataclass(frozen=True, kw_only=True)
class StepOptions(PolicyParameters):
    """What a step draws, scores and learns from, whatever the algorithm."""

    gen: GenerationOptions = nested(GenerationOptions)
    ppo_n_minibatches: int = option(4, "updates that the sequences of a step are split into", at_least=1, at_most=2**16)
    ppo_epochs: int = option(1, "passes over the sequences of a step", at_least=1, at_most=1000)
    routing_replay: bool = option(
        False,
        "the actor's training sends each token to the experts that it went to when it was drawn; for models with "
        "experts, whose router would else choose otherwise now and then",
    )
    shuffle_minibatches: bool = option(True, "deal the sequences to minibatches anew in each pass")
    reward_output_scaling: float = option(1.0, "the reward model's score becomes (score - bias) * scaling")
    reward_output_bias: float = option(0.0, "see reward_output_scaling")
    ref_ema_eta: float | None = option(
        None, "after each step the reference becomes eta * actor + (1 - eta) * reference; null leaves it as it is"
    )

    # The older release has the options of generation one level up.
    ALIASES: ClassVar[dict[str, str]] = {
        field.name: f"gen.{field.name}" for field in dataclasses.fields(GenerationOptions)
    }
    NO_EFFECT: ClassVar[dict[str, str]] = GenerationOptions.NO_EFFECT

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ref_ema_eta is not None and not (0 < self.ref_ema_eta <= 1 and self.needs_reference):
            raise ValueError(
                f"ref_ema_eta: found {self.ref_ema_eta} with kl_ctl={self.kl_ctl}; it must be in (0, 1], with a kl_ctl "
                "above 0, or null"
            )

    @property
    def has_fixed_length(self) -> bool:
        """True when every answer has max_new_tokens: none can end by itself, and none is cut off either."""
        return self.gen.min_new_tokens == self.gen.max_new_tokens

    @property
    def judges_groups(self) -> bool:
        """True when an answer is only compared with others to its prompt."""
        return "group" in self.JUDGED_BY

    def resolved(self, staleness: int = 0) -> Self:
        """Returns these options with all filled in that is left open: max_response_len, scores for answers of a fixed
        length, and for answers of a `staleness` what corrects for that.
        """
        recomputes = self.recomputes if self.recompute_logprobs is not None else staleness > 0 or self.recomputes
        correction = self.correction
        if correction.kind == "auto":
            correction = dataclasses.replace(correction, kind="tis" if staleness > 0 and recomputes else "none")
        return dataclasses.replace(
            self,
            max_response_len=self.max_response_len or self.gen.max_new_tokens,
            missing_eos_penalty=0.0
            if self.has_fixed_length and self.missing_eos_penalty is None
            else self.missing_eos_penalty,
            recompute_logprobs=recomputes,
            correction=correction,
        )


@dataclass(frozen=True, kw_only=True)
class PPOHyperparameters(PPOParameters, StepOptions):
    """PPO: how sequences are drawn, scored and learned from."""


@dataclass(frozen=True, kw_only=True)
class GRPOHyperparameters(GRPOParameters, StepOptions):
    """GRPO: how sequences are drawn, scored and learned from."""

    max_draws: int = option(
        1,
        "dynamic sampling: prompts are drawn until a step has train_bs_n_seqs whose answers differ in reward, in so "
        "many draws at most; 1: a step takes its prompts as they are",
        at_least=1,
        at_most=1000,
    )
    if_uniform: Literal["go_on", "stop"] = option(
        "go_on", "where max_draws bring no prompt whose answers differ: go on without an update, or end the run"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_draws > 1 and not self.drop_uniform_groups:
            raise ValueError(
                f"max_draws: found {self.max_draws} with drop_uniform_groups=False; prompts whose answers all have one "
                "reward are drawn again and not learned from, so set drop_uniform_groups to True, or max_draws to 1"
            )
        if self.mask_truncated and self.has_fixed_length:
            raise ValueError(
                f"mask_truncated: found True with gen.min_new_tokens = gen.max_new_tokens = {self.gen.max_new_tokens}, "
                "so that every answer is cut off and nothing would be learned; lower gen.min_new_tokens, or set it to "
                "False"
            )


@dataclass(frozen=True, kw_only=True)
class RLOOHyperparameters(RLOOParameters, StepOptions):
    """RLOO: how sequences are drawn, scored and learned from."""

    ppo_n_minibatches: int = option(1, "updates that the sequences of a step are split into", at_least=1, at_most=2**16)


@dataclass(frozen=True, kw_only=True)
class ReMaxHyperparameters(ReMaxParameters, StepOptions):
    """ReMax: how sequences are drawn, scored and learned from."""

    ppo_n_minibatches: int = option(1, "updates that the sequences of a step are split into", at_least=1, at_most=2**16)


@dataclass(frozen=True, kw_only=True)
class ReinforcePPHyperparameters(ReinforcePPParameters, StepOptions):
    """REINFORCE++: how sequences are drawn, scored and learned from."""


@dataclass(frozen=True, kw_only=True)
class RLConfig(CommonExperimentConfig):
    """Options of every algorithm that learns from rewards of its own answers to prompts."""

    actor: ModelTrainEvalConfig = nested(ModelTrainEvalConfig)
    ref: ModelTrainEvalConfig = nested(ModelTrainEvalConfig)
    rew: ModelTrainEvalConfig = nested(ModelTrainEvalConfig, type=ModelFamily(size=7, is_critic=True))
    actor_gen: MFCConfig = nested(MFCConfig)
    actor_train: MFCConfig = nested(MFCConfig)
    ref_inf: MFCConfig = nested(MFCConfig)
    rew_inf: MFCConfig = nested(MFCConfig)
    dataset: PromptOnlyDatasetConfig = nested(PromptOnlyDatasetConfig)
    reward: RewardOptions = nested(RewardOptions)
    env: EnvironmentOptions = nested(EnvironmentOptions)
    eval: EvaluationOptions = nested(EvaluationOptions)
    rollouts: RolloutOptions = nested(RolloutOptions)
    staleness: int = option(
        0,
        "steps of training between the parameters that draw an answer and those that train on it, at most. 0: a step "
        "draws its own answers. 1: the next step's are drawn beside training, on other devices. More: they may be "
        "begun so many steps ahead, and go on under newer parameters",
        at_least=0,
        at_most=64,
    )

    EVALUATES: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_role("actor", self.actor, is_critic=False, is_trained=True)
        check_role("ref", self.ref, is_critic=False, is_trained=False)
        check_role("rew", self.rew, is_critic=True, is_trained=False)
        self._check_staleness()
        if self.eval.sampled:
            check_samples_differ("eval.num_samples", self.eval.num_samples, self.algorithm.gen)
        num_seqs = self.dataset.train_bs_n_seqs * self.num_samples
        if self.algorithm.ppo_n_minibatches > num_seqs:
            raise ValueError(
                f"ppo_n_minibatches: found {self.algorithm.ppo_n_minibatches} for the {num_seqs} sequences of a step; "
                f"set it to {num_seqs} or less, or raise dataset.train_bs_n_seqs"
            )

    def _check_staleness(self) -> None:
        own = self.algorithm
        if self.staleness and own.recompute_logprobs is False and own.surrogate == "reinforce":
            raise ValueError(
                f"staleness: found {self.staleness} with recompute_logprobs=False and surrogate=reinforce, whose "
                "gradient would be taken for that of newer answers; leave recompute_logprobs out, for weights that "
                "correct it, or take a surrogate with a ratio, such as clip"
            )

    @property
    def algorithm(self) -> StepOptions:
        """The algorithm's own options."""
        raise NotImplementedError

    @property
    def num_samples(self) -> int:
        """Answers drawn for each prompt."""
        return 1

    @property
    def unused(self) -> frozenset[str]:
        ref = () if self.algorithm.needs_reference else ("ref", "ref_inf")
        rew = () if self.rew.path else ("rew", "rew_inf")
        return frozenset((*ref, *rew))

    def check(self) -> None:
        if not (self.rew.path or self.reward.fn or self.reward.classifier or self.env.path):
            raise ValueError(
                "rew.path: nothing given, and no other source of rewards; give a reward model here, a function as "
                "reward.fn, a classifier as reward.classifier, or an environment as env.path"
            )
        self.env.check(max_new_tokens=self.algorithm.gen.max_new_tokens)
        self.reward.check()
        if self.eval.vote_fn:
            load_function(self.eval.vote_fn, "eval.vote_fn")

    def notices(self) -> list[str]:
        notices = []
        if self.algorithm.has_kl_loss and self.algorithm.kl_estimator == "k1":
            notices.append(
                "kl_estimator=k1 has no effect with kl_in=loss: its gradient is 0 on average. Use k2 or kl_in=reward."
            )
        if self.staleness and self.algorithm.correction.kind == "none":
            notices.append(
                f"correction.kind=none with staleness={self.staleness}: nothing tells older answers from the actor's "
                "own but a ratio from the sampler (recompute_logprobs=False). Leave kind out for weights."
            )
        if self.algorithm.has_fixed_length and self.algorithm.missing_eos_penalty and self.algorithm.judges_groups:
            notices.append(
                "missing_eos_penalty has no effect: with gen.min_new_tokens = max_new_tokens every answer is cut off, "
                "so it takes the same from all answers to a prompt."
            )
        if self.algorithm.has_fixed_length and self.algorithm.missing_eos_penalty is None:
            notices.append(
                "gen.min_new_tokens equals max_new_tokens, so no answer can end by itself: each is given its score as "
                "if it had ended (missing_eos_penalty=0)."
            )
        return notices


@dataclass(frozen=True, kw_only=True)
class PPOConfig(RLAdapterOptions, RLConfig):
    """PPO: an actor learns from rewards, with a critic's values as their baseline."""

    rew_head_path: str | None = option(None, "only null: the head of a reward model is part of its checkpoint")
    critic: ModelTrainEvalConfig = nested(ModelTrainEvalConfig, type=ModelFamily(size=7, is_critic=True))
    critic_inf: MFCConfig = nested(MFCConfig)
    critic_train: MFCConfig = nested(MFCConfig)
    ppo: PPOHyperparameters = nested(PPOHyperparameters)

    ALIASES: ClassVar[dict[str, str]] = {**CommonExperimentConfig.ALIASES, "ref_ema_eta": "ppo.ref_ema_eta"}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_role("critic", self.critic, is_critic=True, is_trained=True)
        self.check_adapters()
        if self.rew_head_path:
            raise ValueError(
                f"rew_head_path: found {self.rew_head_path!r}; the head of a reward model is part of its checkpoint, "
                "or of its adapters: leave it out"
            )

    @property
    def algorithm(self) -> PPOHyperparameters:
        return self.ppo


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(RLConfig):
    """GRPO: an actor learns from rewards, compared within several answers to a prompt."""

    group_size: int = option(4, "answers to each prompt", at_least=2, at_most=2**16)
    ppo: GRPOHyperparameters = nested(GRPOHyperparameters)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_samples_differ("group_size", self.group_size, self.ppo.gen)
        if self.staleness and self.ppo.max_draws > 1:
            raise ValueError(
                f"staleness: found {self.staleness} with ppo.max_draws={self.ppo.max_draws}; answers drawn ahead are "
                "those to a step's prompts as they are: set staleness to 0, or max_draws to 1"
            )

    @property
    def algorithm(self) -> GRPOHyperparameters:
        return self.ppo

    @property
    def num_samples(self) -> int:
        return self.group_size


@dataclass(frozen=True, kw_only=True)
class RLOOConfig(RLConfig):
    """RLOO: an actor learns from rewards, each compared with those of the prompt's other answers."""

    group_size: int = option(4, "answers to each prompt", at_least=2, at_most=2**16)
    rloo: RLOOHyperparameters = nested(RLOOHyperparameters)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_samples_differ("group_size", self.group_size, self.rloo.gen)

    @property
    def algorithm(self) -> RLOOHyperparameters:
        return self.rloo

    @property
    def num_samples(self) -> int:
        return self.group_size


@dataclass(frozen=True, kw_only=True)
class ReinforcePPConfig(RLConfig):
    """REINFORCE++: an actor learns from rewards, compared with those of all answers of a step."""

    group_size: int = option(
        1, "answers to each prompt; with reinforce.use_baseline at least 2", at_least=1, at_most=2**16
    )
    reinforce: ReinforcePPHyperparameters = nested(ReinforcePPHyperparameters)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_samples_differ("group_size", self.group_size, self.reinforce.gen)
        if self.reinforce.use_baseline and self.group_size < 2:
            raise ValueError(
                "reinforce.use_baseline: found True with group_size=1, where an answer is its own baseline and nothing "
                "is left to learn from; set group_size to 2 or more, or use_baseline to False"
            )

    @property
    def algorithm(self) -> ReinforcePPHyperparameters:
        return self.reinforce

    @property
    def num_samples(self) -> int:
        return self.group_size


@dataclass(frozen=True, kw_only=True)
class ReMaxConfig(RLConfig):
    """ReMax: an actor learns from rewards, compared with that of its greedy answer to the prompt."""

    remax: ReMaxHyperparameters = nested(ReMaxHyperparameters)

    # ReaL has these at the top level, and a call of its own for greedy answers.
    ALIASES: ClassVar[dict[str, str]] = {
        **CommonExperimentConfig.ALIASES,
        **{
            name: f"remax.{name}"
            for name in ("gen", "discount", "adv_norm", "reward_output_scaling", "reward_output_bias")
        },
        "sample_gen": "actor_gen",
        "sample_rew_inf": "rew_inf",
    }
    NO_EFFECT: ClassVar[dict[str, str]] = {
        **CommonExperimentConfig.NO_EFFECT,
        "greedy_gen": "greedy answers are generated together with the samples, in actor_gen",
        "greedy_rew_inf": "greedy answers are scored together with the samples, in rew_inf",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_samples_differ("answers to a prompt, the baseline counted", 2, self.remax.gen)

    @property
    def algorithm(self) -> ReMaxHyperparameters:
        return self.remax
