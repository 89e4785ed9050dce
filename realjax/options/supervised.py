"""The options of each experiment."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

from realjax.algorithms.dpo import DPOParameters
from realjax.options.common import CommonExperimentConfig
from realjax.options.datasets import PairedComparisonDatasetConfig, PromptAnswerDatasetConfig
from realjax.options.fields import group, option
from realjax.options.model import ModelFamily, ModelTrainEvalConfig
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
        check_role("model", self.model, is_critic=False, is_trained=True)


@dataclass(frozen=True, kw_only=True)
class RWConfig(CommonExperimentConfig):
    """Reward modelling: a scalar head learns which of two answers to a prompt is better."""

    is_sft_lora: bool = option(False, "only False: low-rank adapters are not available")
    sft_lora_path: str | None = option(None, "only null: low-rank adapters are not available")
    model: ModelTrainEvalConfig = group(ModelTrainEvalConfig, type=ModelFamily(size=7, is_critic=True))
    allocation: MFCConfig = group(MFCConfig)
    dataset: PairedComparisonDatasetConfig = group(PairedComparisonDatasetConfig)

    EVALUATES: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_lora(self)
        check_role("model", self.model, is_critic=True, is_trained=True)


@dataclass(frozen=True, kw_only=True)
class DPOConfig(CommonExperimentConfig):
    """Direct preference optimisation of an actor against a frozen reference."""

    is_sft_lora: bool = option(False, "only False: low-rank adapters are not available")
    sft_lora_path: str | None = option(None, "only null: low-rank adapters are not available")
    actor: ModelTrainEvalConfig = group(ModelTrainEvalConfig)
    ref: ModelTrainEvalConfig = group(ModelTrainEvalConfig)
    actor_train: MFCConfig = group(MFCConfig)
    ref_inf: MFCConfig = group(MFCConfig)
    dataset: PairedComparisonDatasetConfig = group(PairedComparisonDatasetConfig)
    beta: float = option(0.1, "strength of the pull towards the reference")
    loss_type: Literal["sigmoid", "ipo"] = option("sigmoid", "sigmoid: DPO. ipo: squared loss on mean log-ratios")
    label_smoothing: float = option(0.0, "share of pairs taken to be labelled the wrong way round, below 0.5")
    reference_free: bool = option(False, "compare with a uniform reference; the ref model is then not used")

    EVALUATES: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_lora(self)
        check_role("actor", self.actor, is_critic=False, is_trained=True)
        check_role("ref", self.ref, is_critic=False, is_trained=False)
        if self.beta <= 0:
            raise ValueError(f"beta: found {self.beta}; it must be above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing: found {self.label_smoothing}; it must be in [0, 0.5)")
        _ = self.parameters  # which refuse what does not go together

    @property
    def parameters(self) -> DPOParameters:
        """What the loss needs to know."""
        names = (field.name for field in dataclasses.fields(DPOParameters))
        return DPOParameters(**{name: getattr(self, name) for name in names})

    @property
    def unused(self) -> frozenset[str]:
        """Names of the models and calls that a run with these options does without."""
        return frozenset({"ref", "ref_inf"}) if self.reference_free else frozenset()


def check_role(name: str, model: ModelTrainEvalConfig, *, is_critic: bool, is_trained: bool) -> None:
    """Raises ValueError when a model's head or optimizer is not what its role in the experiment needs."""
    if model.is_critic != is_critic:
        remedy = "set it to True" if is_critic else "set it, and init_critic_from_actor, to False"
        head = "a scalar head" if is_critic else "a language model's head"
        raise ValueError(f"{name}.type.is_critic: found {model.type.is_critic}; this model needs {head}: {remedy}")
    if is_trained and model.optimizer.type == "empty":
        raise ValueError(f"{name}.optimizer.type: found empty; this model is trained, so it needs adam")


def refuse_lora(config: RWConfig | DPOConfig) -> None:
    """Raises ValueError for a low-rank adapter option, which older commands may carry."""
    if config.is_sft_lora or config.sft_lora_path is not None:
        raise ValueError("is_sft_lora: low-rank adapters are not available; leave it False and sft_lora_path null")
