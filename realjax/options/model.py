"""Options of one model of an experiment: what it is, where it comes from, how it computes."""

import re
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from realjax.core.compute import Compute
from realjax.core.optimizer_config import OptimizerConfig
from realjax.core.option import check_ranges, nested, option
from realjax.options.lora import LoRAOptions

# What `realjax.hf.families` says its families are published as.
ModelClass = Literal[
    "llama",
    "codellama",
    "deepseek",
    "granite",
    "mistral",
    "ministral3",
    "olmo2",
    "olmo3",
    "phi3",
    "phi4",
    "qwen2",
    "qwen3",
    "smollm3",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "gpt_oss",
    "glm4_moe",
    "granitemoe",
    "gemma",
    "gemma2",
    "gemma3",
    "gpt2",
]


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """What kind of model this is. Also written in one word, as `type=llama-7` or `type=llama-7-critic`."""

    _class: ModelClass | None = option(
        None, "architecture that path must hold; null takes any of these; type=llama-7-critic sets all three at once"
    )
    size: int = option(0, "billions of parameters; only heuristic and search allocation use it", at_least=0)
    is_critic: bool = option(False, "a scalar head (reward model, critic) instead of a language-model head")

    def __post_init__(self) -> None:
        check_ranges(self)

    @classmethod
    def from_text(cls, text: str, name: str) -> "ModelFamily":
        """Returns the family that `<class>-<size>[-critic]` describes; ValueError naming the option `name`."""
        match = re.fullmatch(r"([a-z0-9_]+)-(\d{1,9})(-critic)?", text)
        known = {name: name for name in get_args(ModelClass)}
        if match is None or match[1] not in known:
            raise ValueError(
                f"{name}: found {text!r}; it needs <class>-<size> or <class>-<size>-critic, such as llama-7-critic, "
                f"with class one of {', '.join(known)}"
            )
        return cls(_class=known[match[1]], size=int(match[2]), is_critic=match[3] is not None)


@dataclass(frozen=True, kw_only=True)
class ModelTrainEvalConfig:
    """One model: its checkpoint, precision, memory and optimizer."""

    type: ModelFamily = nested(ModelFamily, size=7)
    path: str = option("", "Hugging Face checkpoint: a local directory or a hub identifier")
    init_from_scratch: bool = option(False, "random weights; configuration and tokenizer still come from path")
    init_critic_from_actor: bool = option(
        False, "path holds a language model: drop its head and start a new scalar head; implies a critic"
    )
    gradient_checkpointing: bool | None = option(
        None,
        "recompute each layer in the backward pass instead of keeping it; null does, or as search allocation finds",
    )
    enable_bf16: bool | None = option(
        None, "compute in bfloat16 (True) or float32 (False); null is bfloat16 on accelerators, float32 on CPUs"
    )
    enable_fp16: bool | None = option(None, "half precision; computed in bfloat16, which needs no loss scale")
    attention: Literal["auto", "dense", "blocked", "skipping", "xla", "cudnn"] = option(
        "auto",
        "attention kernel: blocks of queries (blocked), these one by one without the keys before their segments "
        "(skipping), all scores at once (dense), JAX's own (xla) or cuDNN's (cudnn, Hopper and later); where it has no "
        "form for decoding, auto's serves there, and the log says so",
    )
    unroll_layers: bool | None = option(
        None,
        "compile every layer by itself: quicker steps and longer compiles, but on CPUs gradient_checkpointing saves no "
        "memory then; null does so on CPUs without gradient_checkpointing",
    )
    loss_chunk_tokens: int | None = option(
        None, "tokens whose logits are in memory at once while the loss is computed; null chooses", at_least=1
    )
    zero_stage: Literal[0, 1, 2, 3] | None = option(
        None,
        "what data parallelism shards: 0 nothing, 1 and 2 the optimizer state, 3 the parameters too; null is 2, or as "
        "search allocation finds",
    )
    offload: bool | None = option(None, "keep parameters in host memory between calls; null decides by need")
    lora: LoRAOptions = nested(LoRAOptions)
    router_aux_loss_coef: float | None = option(
        None,
        "of the balance loss in training a model with experts; null is config.json's, 0 but where it sets "
        "output_router_logits",
        at_least=0,
    )
    router_z_loss_coef: float = option(
        0.0, "of the mean square of log sum exp of router logits in training a model with experts", at_least=0
    )
    optimizer: OptimizerConfig = nested(OptimizerConfig)

    NO_EFFECT: ClassVar[dict[str, str]] = {
        "backend": "every model trains with the JAX engine, and any of them can be reallocated",
    }

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.enable_bf16 and self.enable_fp16:
            raise ValueError("enable_bf16: found True together with enable_fp16=True; set one of them to False or null")

    @property
    def dtype(self) -> Literal["auto", "bfloat16", "float32"]:
        """Type of the computation, masters being float32; `auto` is bfloat16 on accelerators and float32 on CPUs."""
        if self.enable_bf16 or self.enable_fp16:
            return "bfloat16"
        return "float32" if self.enable_bf16 is False else "auto"

    @property
    def compute(self) -> Compute:
        """How the model's programs compute."""
        return Compute(
            dtype=self.dtype,
            attention=self.attention,
            remat=self.gradient_checkpointing is not False,
            unroll=self.unroll_layers,
            loss_chunk_tokens=self.loss_chunk_tokens,
        )

    @property
    def term_coefs(self) -> dict[str, float]:
        """Coefficients of terms that layers add to the loss, where they are to be others than the checkpoint's."""
        z_loss = {"router_z_loss": self.router_z_loss_coef} if self.router_z_loss_coef else {}
        return z_loss if self.router_aux_loss_coef is None else {"balance_loss": self.router_aux_loss_coef, **z_loss}

    @property
    def zero_stage_or_default(self) -> int:
        """`zero_stage`, 2 where it is null."""
        return 2 if self.zero_stage is None else self.zero_stage

    @property
    def undecided(self) -> frozenset[str]:
        """What allocation may decide, by its name in `RoleSpec` or `Compute`."""
        open_options = {"remat": self.gradient_checkpointing, "zero_stage": self.zero_stage}
        return frozenset(name for name, value in open_options.items() if value is None)

    @property
    def is_critic(self) -> bool:
        """True when the model ends in a scalar head."""
        return self.type.is_critic or self.init_critic_from_actor
