"""What a model is: its sizes and its switches. No weights, no mesh, no precision."""

from dataclasses import dataclass, field, replace
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (arXiv:2104.09864). `llama3` scales frequencies as Llama 3.1 does, `linear` divides
    positions.
    """

    theta: float = 10000.0
    scaling: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer. Raises ValueError when sizes do not fit together."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    max_positions: int
    norm_eps: float = 1e-5
    activation: Literal["silu", "gelu_tanh", "gelu"] = "silu"
    rope: RopeConfig = field(default_factory=RopeConfig)
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # qwen3: RMS norm over each head of q and k before rotary
    tied: bool = False  # the head is the embedding table
    sliding_window: int | None = None  # a token sees itself and the window-1 tokens before it
    is_critic: bool = False  # a scalar head instead of the vocabulary's
    # Layers of zeros at the end of the stack, which make pipeline stages equal. Identities, no part of the model.
    num_empty_layers: int = 0

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_q_heads",
            "num_kv_heads",
            "head_dim",
            "ffn_size",
            "max_positions",
        ):
            if (size := getattr(self, name)) < 1:
                raise ValueError(f"model config: {name}={size}; it must be at least 1")
        if self.num_empty_layers < 0:
            raise ValueError(f"model config: num_empty_layers={self.num_empty_layers}; it must be at least 0")
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                f"model config: {self.num_q_heads} query heads do not divide over {self.num_kv_heads} key-value heads; "
                "num_attention_heads must be a multiple of num_key_value_heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"model config: head_dim={self.head_dim} is odd; rotary embedding needs an even head size")
        if self.is_critic and self.tied:
            raise ValueError("model config: a critic has its own scalar head and cannot be tied to the embedding")

    @property
    def num_stacked_layers(self) -> int:
        """The length of the stack of parameters: the model's layers, then the empty ones."""
        return self.num_layers + self.num_empty_layers

    def as_critic(self) -> "ModelConfig":
        """Returns the same trunk with a scalar head."""
        return replace(self, is_critic=True, tied=False)
