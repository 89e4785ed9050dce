"""Options of distillation: an actor learns from what a teacher says of each token."""

from dataclasses import dataclass
from typing import ClassVar

from realjax.algorithms.distill import DistillParameters
from realjax.core.option import nested, option
from realjax.options.common import CommonExperimentConfig
from realjax.options.datasets import PromptOnlyDatasetConfig
from realjax.options.evaluation import RolloutOptions
from realjax.options.generation import GenerationOptions, check_samples_differ
from realjax.options.model import ModelFamily, ModelTrainEvalConfig
from realjax.options.parallel import MFCConfig
from realjax.options.supervised import check_role


@dataclass(frozen=True, kw_only=True)
class DistillOptions(DistillParameters):
    """What a step answers, compares and learns from."""

    gen: GenerationOptions = nested(GenerationOptions)
    data_share: float = option(
        0.0,
        "share of the answers that are the data's, the rows' `answer`, in place of the actor's own; 1: all of them",
        at_least=0,
        at_most=1,
    )
    n_minibatches: int = option(1, "updates that the sequences of a step are split into", at_least=1, at_most=2**16)


@dataclass(frozen=True, kw_only=True)
class DistillConfig(CommonExperimentConfig):
    """Distillation: an actor learns a teacher's distribution at each token of its own answers, or of the data's."""

    actor: ModelTrainEvalConfig = nested(ModelTrainEvalConfig)
    teacher: ModelTrainEvalConfig = nested(ModelTrainEvalConfig, type=ModelFamily(size=7))
    actor_gen: MFCConfig = nested(MFCConfig)
    actor_train: MFCConfig = nested(MFCConfig)
    teacher_inf: MFCConfig = nested(MFCConfig)
    dataset: PromptOnlyDatasetConfig = nested(PromptOnlyDatasetConfig)
    group_size: int = option(1, "answers to each prompt", at_least=1, at_most=2**16)
    distill: DistillOptions = nested(DistillOptions)
    rollouts: RolloutOptions = nested(RolloutOptions)

    EVALUATES: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_role("actor", self.actor, is_critic=False, is_trained=True)
        check_role("teacher", self.teacher, is_critic=False, is_trained=False)
        check_samples_differ("group_size", self.group_size, self.distill.gen)
        num_seqs = self.dataset.train_bs_n_seqs * self.group_size
        if self.distill.n_minibatches > num_seqs:
            raise ValueError(
                f"distill.n_minibatches: found {self.distill.n_minibatches} for the {num_seqs} sequences of a step; "
                f"set it to {num_seqs} or less, or raise dataset.train_bs_n_seqs"
            )
