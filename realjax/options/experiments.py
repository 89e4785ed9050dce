"""The options of each experiment."""

from dataclasses import dataclass
from typing import ClassVar

from realjax.options.common import CommonExperimentConfig
from realjax.options.datasets import PromptAnswerDatasetConfig
from realjax.options.fields import group
from realjax.options.model import ModelTrainEvalConfig
from realjax.options.parallel import MFCConfig


@dataclass(frozen=True, kw_only=True)
class SFTConfig(CommonExperimentConfig):
    """Supervised fine-tuning of one language model on prompts and answers."""

    model: ModelTrainEvalConfig = group(ModelTrainEvalConfig)
    allocation: MFCConfig = group(MFCConfig)
    dataset: PromptAnswerDatasetConfig = group(PromptAnswerDatasetConfig)

    EVALUATES: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model.is_critic:
            raise ValueError(
                "model.type.is_critic: found a critic; sft trains a language model, so is_critic and "
                "init_critic_from_actor must be False"
            )
        if self.model.optimizer.type == "empty":
            raise ValueError("model.optimizer.type: found empty; sft trains this model, so it needs adam")
