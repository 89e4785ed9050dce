"""Options of low-rank adapters: of a model's own, and of checkpoints that are made of a model and adapters."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from realjax.core.lora_config import LoRAConfig
from realjax.core.option import check_ranges, option


@dataclass(frozen=True, kw_only=True)
class LoRAOptions:
    """Low-rank adapters (LoRA) beside a model's weights, which then stay as they are; `lora=16` sets the rank."""

    rank: int = option(0, "numbers between the two matrices of an adapter; 0: all parameters are trained", at_least=0)
    alpha: float = option(32.0, "an adapter's product counts alpha / rank times", above=0)
    targets: tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...] | None = option(
        None, "maps of each layer that have one; null is all of them, of a model with experts those of attention"
    )
    rank_stabilised: bool = option(False, "the product counts alpha / sqrt(rank) times (rsLoRA)")
    path: str | None = option(
        None, "adapter to begin with, as PEFT saves it, which says rank, alpha and targets; null begins a new one"
    )
    merge: bool = option(
        False,
        "draw answers from weights with the adapter added to them: quicker, rounded to their precision, and takes a "
        "second copy of the weights while answers are drawn",
    )

    NULL_IS_DEFAULT: ClassVar[bool] = True  # `lora=null` is none
    # ReaL's names of them, and PEFT's.
    ALIASES: ClassVar[dict[str, str]] = {
        "dim": "rank",
        "scaling": "alpha",
        "r": "rank",
        "lora_alpha": "alpha",
        "use_rslora": "rank_stabilised",
    }

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.path is not None and self.rank:
            raise ValueError(f"rank: found {self.rank} with path='{self.path}', which has a rank itself; leave one out")
        if not self.is_on and (self.merge or self.targets is not None or self.rank_stabilised):
            raise ValueError("rank: found 0, so there is no adapter for the other options of lora; set rank, or path")

    @classmethod
    def from_text(cls, text: str, name: str) -> "LoRAOptions":
        """Returns the adapters of a rank that is given alone. ValueError naming the option `name`."""
        if not text.isdecimal():
            raise ValueError(
                f"{name}: found {text!r}; it needs a rank, such as {name}=16, or options below it, such as "
                f"{name}.rank=16 {name}.alpha=32"
            )
        return cls(rank=int(text))

    @property
    def is_on(self) -> bool:
        """True where the model has adapters."""
        return self.rank > 0 or self.path is not None

    def describe(self, has_experts: bool, has_gate: bool) -> LoRAConfig:
        """Returns the new adapters of a model."""
        of_feed_forward = () if has_experts else ("gate", "up", "down") if has_gate else ("up", "down")
        targets = ("q", "k", "v", "o", *of_feed_forward) if self.targets is None else tuple(self.targets)
        return LoRAConfig(rank=self.rank, alpha=self.alpha, targets=targets, rank_stabilised=self.rank_stabilised)


@dataclass(frozen=True, kw_only=True)
class MergedAdapter:
    """Adapters that are merged into weights where these are read, and the option that names them."""

    path: str
    option: str


@dataclass(frozen=True, kw_only=True)
class SFTAdapterOptions:
    """Of an experiment on models that were fine-tuned with adapters."""

    is_sft_lora: bool = option(False, "path holds weights that were fine-tuned with adapters, which sft_lora_path has")
    sft_lora_path: str | None = option(
        None, "adapters, as sft saves them or PEFT, that are merged into the weights of actor and ref, or of model"
    )

    def check_adapters(self) -> None:
        """Raises ValueError for one of the two options without the other."""
        _check_pair("sft", self.is_sft_lora, self.sft_lora_path)

    @property
    def sft_adapter(self) -> MergedAdapter | None:
        """What is merged into the model, and into its reference."""
        path = self.sft_lora_path
        return None if path is None else MergedAdapter(path=path, option="sft_lora_path")


@dataclass(frozen=True, kw_only=True)
class RLAdapterOptions(SFTAdapterOptions):
    """Of an experiment whose reward model may have been trained with adapters too."""

    is_rew_lora: bool = option(False, "rew.path holds weights whose reward model is adapters, which rew_lora_path has")
    rew_lora_path: str | None = option(
        None,
        "adapters and head, as rw or PEFT save them, that are merged into the weights of rew.path, and of the critic "
        "where that has the same path",
    )

    def check_adapters(self) -> None:
        """Raises ValueError for one option of a pair without the other."""
        super().check_adapters()
        _check_pair("rew", self.is_rew_lora, self.rew_lora_path)

    @property
    def rew_adapter(self) -> MergedAdapter | None:
        """What is merged into the reward model."""
        path = self.rew_lora_path
        return None if path is None else MergedAdapter(path=path, option="rew_lora_path")


def _check_pair(name: str, is_on: bool, path: str | None) -> None:
    if is_on and path is None:
        raise ValueError(f"{name}_lora_path: found null with is_{name}_lora=True; give the directory of the adapters")
    if path is not None and not is_on:
        raise ValueError(f"is_{name}_lora: found False with {name}_lora_path='{path}'; set it to True, or drop both")


def adapter_directory(path: str, option_name: str) -> Path:
    """Returns the directory of adapters that an option names. Raises ValueError where there is none."""
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise ValueError(f"{option_name}: '{path}' is no directory; give one that holds adapter_config.json")
    return directory
