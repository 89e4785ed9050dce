"""The options of each experiment."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from realjax.algorithms.dpo import DPOParameters
from realjax.algorithms.kto import KTOParameters
from realjax.algorithms.orpo import ORPOParameters
from realjax.algorithms.simpo import SimPOParameters
from realjax.core.option import DataclassInstance, nested
from realjax.options.common import CommonExperimentConfig
from realjax.options.datasets import (
    LabelledAnswerDatasetConfig,
    PairedComparisonDatasetConfig,
    PromptAnswerDatasetConfig,
)
from realjax.options.evaluation import SampleOptions
from realjax.options.lora import SFTAdapterOptions
from realjax.options.model import ModelFamily, ModelTrainEvalConfig
from realjax.options.parallel import MFCConfig

Parameters = TypeVar("Parameters", bound=DataclassInstance)


@dataclass(frozen=True, kw_only=True)
class AnsweringConfig(CommonExperimentConfig):
    """Options of what trains a language model on given answers, and may show the model's own."""

    samples: SampleOptions = nested(SampleOptions)

    @property
    def held_out_use(self) -> str | None:
        """How the use of held-out data is turned off, None where there is none."""
        return super().held_out_use or ("samples.num_prompts=0" if self.samples.num_prompts else None)


@dataclass(frozen=True, kw_only=True)
class SFTConfig(AnsweringConfig):
    """Supervised fine-tuning of one language model on prompts and answers."""

    model: ModelTrainEvalConfig = nested(ModelTrainEvalConfig)
    allocation: MFCConfig = nested(MFCConfig)
    dataset: PromptAnswerDatasetConfig = nested(PromptAnswerDatasetConfig)

    EVALUATES: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_role("model", self.model, is_critic=False, is_trained=True)


@dataclass(frozen=True, kw_only=True)
class RWConfig(SFTAdapterOptions, CommonExperimentConfig):
    """Reward modelling: a scalar head learns which of two answers to a prompt is better."""

    model: ModelTrainEvalConfig = nested(ModelTrainEvalConfig, type=ModelFamily(size=7, is_critic=True))
    allocation: MFCConfig = nested(MFCConfig)
    dataset: PairedComparisonDatasetConfig = nested(PairedComparisonDatasetConfig)

    EVALUATES: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_adapters()
        check_role("model", self.model, is_critic=True, is_trained=True)


@dataclass(frozen=True, kw_only=True)
class DPOConfig(DPOParameters, SFTAdapterOptions, AnsweringConfig):
    """Direct preference optimisation of an actor against a frozen reference."""

    actor: ModelTrainEvalConfig = nested(ModelTrainEvalConfig)
    ref: ModelTrainEvalConfig = nested(ModelTrainEvalConfig)
    actor_train: MFCConfig = nested(MFCConfig)
    ref_inf: MFCConfig = nested(MFCConfig)
    dataset: PairedComparisonDatasetConfig = nested(PairedComparisonDatasetConfig)

    EVALUATES: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_adapters()
        check_role("actor", self.actor, is_critic=False, is_trained=True)
        check_role("ref", self.ref, is_critic=False, is_trained=False)

    @property
    def parameters(self) -> DPOParameters:
        """What the loss needs to know."""
        return select_options(DPOParameters, self)

    @property
    def unused(self) -> frozenset[str]:
        """Names of the models and calls that a run with these options does without."""
        return frozenset({"ref", "ref_inf"}) if self.reference_free else frozenset()


@dataclass(frozen=True, kw_only=True)
class PairsConfig(AnsweringConfig):
    """Options of what learns from pairs of answers without a reference."""

    actor: ModelTrainEvalConfig = nested(ModelTrainEvalConfig)
    actor_train: MFCConfig = nested(MFCConfig)
    dataset: PairedComparisonDatasetConfig = nested(PairedComparisonDatasetConfig)

    EVALUATES: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_role("actor", self.actor, is_critic=False, is_trained=True)


@dataclass(frozen=True, kw_only=True)
class SimPOConfig(SimPOParameters, PairsConfig):
    """SimPO: an actor learns from pairs of answers, compared by their mean log-probabilities."""

    @property
    def parameters(self) -> SimPOParameters:
        """What the loss needs to know."""
        return select_options(SimPOParameters, self)


@dataclass(frozen=True, kw_only=True)
class ORPOConfig(ORPOParameters, PairsConfig):
    """ORPO: an actor is fine-tuned on better answers, against the odds of the worse ones."""

    @property
    def parameters(self) -> ORPOParameters:
        """What the loss needs to know."""
        return select_options(ORPOParameters, self)


@dataclass(frozen=True, kw_only=True)
class KTOConfig(KTOParameters, AnsweringConfig):
    """KTO: an actor learns from answers that are labelled as desirable or not, against a frozen reference."""

    actor: ModelTrainEvalConfig = nested(ModelTrainEvalConfig)
    ref: ModelTrainEvalConfig = nested(ModelTrainEvalConfig)
    actor_train: MFCConfig = nested(MFCConfig)
    ref_inf: MFCConfig = nested(MFCConfig)
    dataset: LabelledAnswerDatasetConfig = nested(LabelledAnswerDatasetConfig)

    EVALUATES: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_role("actor", self.actor, is_critic=False, is_trained=True)
        check_role("ref", self.ref, is_critic=False, is_trained=False)

    @property
    def parameters(self) -> KTOParameters:
        """What the loss needs to know."""
        return select_options(KTOParameters, self)


def select_options(cls: type[Parameters], config: DataclassInstance) -> Parameters:
    """Returns those of an experiment's options that `cls` declares."""
    return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)})


def check_role(name: str, model: ModelTrainEvalConfig, *, is_critic: bool, is_trained: bool) -> None:
    """Raises ValueError when a model's head or optimizer is not what its role in the experiment needs."""
    if model.is_critic != is_critic:
        remedy = "set it to True" if is_critic else "set it, and init_critic_from_actor, to False"
        head = "a scalar head" if is_critic else "a language model's head"
        raise ValueError(f"{name}.type.is_critic: found {model.type.is_critic}; this model needs {head}: {remedy}")
    if is_trained and model.optimizer.type == "empty":
        raise ValueError(f"{name}.optimizer.type: found empty; this model is trained, so it needs adam")
    if not is_trained and model.lora.rank:
        raise ValueError(
            f"{name}.lora.rank: found {model.lora.rank}; this model is not trained, so a new adapter would do nothing: "
            f"leave it out, or give a trained one as {name}.lora.path"
        )
