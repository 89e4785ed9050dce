"""What a step has to compute, wherever it runs: the calls with their models and lengths, as the planner sees them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from realjax.allocation.params import count_params
from realjax.core.layout import ParallelStrategy
from realjax.dataflow.graph import MicroBatches
from realjax.models.config import MLPConfig, ModelConfig, count_places, list_cuts

Kind = Literal["generate", "inference", "train"]
# fn(multiple) -> (R, T): rows of one update's batch and their tokens, where R is a multiple of that. R is a mean.
PackFn = Callable[[int], tuple[float, int]]


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a decoder that cost seconds and bytes. With experts, `ffn_size` is one expert's."""

    hidden_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    is_gated: bool = True  # three products of the feed-forward, not two
    is_tied: bool = False
    is_critic: bool = False
    other_params: int = 0  # beyond what the sizes make; below 0 where some layers are smaller
    num_experts: int = 1
    experts_per_token: int = 1
    shared_size: int = 0  # of a feed-forward beside the experts, in the layers that have these
    num_dense_layers: int = 0  # layers of a model with experts that have one feed-forward instead
    dense_size: int = 0  # of that
    windows: tuple[int | None, ...] = (None,)  # how far layers look back, in turn; None: as far as there are tokens
    cuts: tuple[int, ...] | None = None  # the numbers of equal pipeline stages; None: any, with empty layers

    @classmethod
    def of(cls, config: ModelConfig) -> "ModelShape":
        """Returns the sizes of a model of the house."""
        windows, moe = tuple(layer.mixer.window for layer in config.layers), config.experts
        shape = cls(
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            num_q_heads=config.num_q_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            ffn_size=moe.expert_size if moe else config.ffn_size,
            vocab_size=config.vocab_size,
            num_experts=moe.num_experts if moe else 1,
            experts_per_token=moe.experts_per_token if moe else 1,
            shared_size=moe.shared_size or 0 if moe else 0,
            num_dense_layers=config.num_layers - len(config.routed_layers) if moe else 0,
            dense_size=config.ffn_size if moe else 0,
            is_gated=all(
                kind.feed_forward.gated for kind in config.pattern if isinstance(kind.feed_forward, MLPConfig)
            ),
            is_tied=config.tied,
            is_critic=config.is_critic,
            windows=windows if len(set(windows)) > 1 else windows[:1],
            cuts=None if len(config.kinds) == 1 else tuple(list_cuts(config.order)),
        )
        return replace(shape, other_params=count_params(config) - shape.num_params)

    def mean_places(self, length: float) -> float:
        """Returns the places that a layer's cache has for rows of up to `length` tokens, a mean over the layers."""
        places = [min(length, count_places(window, math.ceil(length))) for window in self.windows]
        return sum(places) / len(places)

    @property
    def attention_params(self) -> int:
        """Of a layer: the products of queries, keys, values and outputs."""
        return 2 * self.hidden_size * self.head_dim * (self.num_q_heads + self.num_kv_heads)

    @property
    def expert_params(self) -> int:
        """Of a layer's feed-forward, or of one of its experts."""
        return (3 if self.is_gated else 2) * self.hidden_size * self.ffn_size

    @property
    def sparse_share(self) -> float:
        """Of the layers, those that have experts."""
        return 1 - self.num_dense_layers / self.num_layers

    @property
    def beside_size(self) -> float:
        """Hidden numbers of feed-forwards that every token goes through beside experts; a mean over layers."""
        return self.sparse_share * self.shared_size + (1 - self.sparse_share) * self.dense_size

    @property
    def beside_params(self) -> float:
        """Of a layer, those of a router and of what `beside_size` counts; a mean over layers."""
        router = self.sparse_share * self.num_experts if self.num_experts > 1 else 0
        return self.hidden_size * (router + (3 if self.is_gated else 2) * self.beside_size)

    @property
    def layer_params(self) -> float:
        """Of one layer, norms included; a mean where layers differ."""
        experts = self.sparse_share * self.num_experts * self.expert_params
        return self.attention_params + experts + self.beside_params + 2 * self.hidden_size

    @property
    def experts_share(self) -> float:
        """Which share of all parameters is that of experts, where a layer has several."""
        return (
            self.sparse_share * self.num_layers * self.num_experts * self.expert_params / self.num_params
            if self.num_experts > 1
            else 0.0
        )

    @property
    def active_layer_params(self) -> float:
        """Of one layer, those that multiply a token; a mean where layers differ."""
        experts = self.sparse_share * self.experts_per_token * self.expert_params
        return self.attention_params + experts + self.beside_params

    @property
    def table_params(self) -> int:
        """Of the embedding, and of a head on the vocabulary."""
        return self.vocab_size * self.hidden_size

    @property
    def head_params(self) -> int:
        """That multiply a token in the head."""
        return self.hidden_size if self.is_critic else self.table_params

    @property
    def num_params(self) -> int:
        """All parameters."""
        own_head = 0 if self.is_tied and not self.is_critic else self.head_params
        outer = self.table_params + own_head + self.hidden_size + self.other_params
        return round(self.num_layers * self.layer_params) + outer

    @property
    def active_params(self) -> int:
        """Those that multiply a token."""
        return round(self.num_layers * self.active_layer_params) + self.head_params


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens of sequences. Attention goes by the mean square."""

    mean: float
    mean_square: float
    longest: int

    @classmethod
    def all(cls, length: int) -> "Lengths":
        """Returns those of sequences that are all as long."""
        return cls(mean=length, mean_square=length**2, longest=length)

    @classmethod
    def measure(cls, lengths: Sequence[int] | np.ndarray) -> "Lengths":
        """Returns those of sequences of which each length is known."""
        found = np.asarray(lengths, np.float64)
        return cls(mean=float(found.mean()), mean_square=float((found**2).mean()), longest=int(found.max()))

    def __add__(self, other: "Lengths") -> "Lengths":
        """Returns those of sequences with others behind them that do not depend on their lengths."""
        return Lengths(
            mean=self.mean + other.mean,
            mean_square=self.mean_square + 2 * self.mean * other.mean + other.mean_square,
            longest=self.longest + other.longest,
        )


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """What of a call's layout the user has decided; None is open."""

    strategy: ParallelStrategy | None = None
    devices: tuple[int, ...] | None = None
    zero_stage: int | None = None
    micro_batches: MicroBatches | None = None
    remat: bool | None = None
    num_slots: int | None = None
    tail_slots: int | None = None
    tail_tp: int | None = None


@dataclass(frozen=True, kw_only=True)
class CallWork:
    """What one call computes in a step."""

    name: str
    role: str
    kind: Kind
    model: ModelShape
    dtype: str  # of the computation
    num_sequences: int  # a step; of a generate call its answers
    prompts: Lengths  # generate: what answers continue; else: the sequences, whole
    answers: Lengths | None = None  # generate: the new tokens
    most_new_tokens: int | None = None  # generate: that an answer may have, and has room for; None: as `answers`
    num_updates: int = 1  # train: of a step
    draws: float = 1.0  # how many times as many sequences it works on, where prompts are drawn again
    passes: int = 1  # train: over the sequences; an update has num_sequences * passes / num_updates of them
    pack_fn: PackFn = field(compare=False, repr=False)  # the rows that the sequences lie in
    scores_vocab: bool = True  # the head is over the vocabulary
    after: tuple[str, ...] = ()  # calls of the step whose results it needs, through host calls too
    is_ahead: bool = False  # it works for the next step, with parameters from before this step's training
    fixed: Fixed = Fixed()

    @property
    def lengths(self) -> Lengths:
        """Of whole sequences."""
        return self.prompts + self.answers if self.answers else self.prompts

    @property
    def num_tokens(self) -> float:
        """Of a step's sequences, each counted once."""
        return self.num_sequences * self.lengths.mean


@dataclass(frozen=True, kw_only=True)
class RoleWork:
    """A model of a run and what of it stays between its calls."""

    name: str
    model: ModelShape
    dtype: str  # of copies for calls, and of parameters that are not trained
    is_trained: bool = False  # float32 masters and two float32 moments stay on the devices of its training call
    is_averaged: bool = False  # float32 parameters that follow a trained role
    # Of all parameters, those that are trained: with adapters few, and the others lie beside them in `dtype`, of a role
    # that is not trained in common with one that is. A copy of those in another layout stays there.
    trained_share: float = 1.0
    is_beside: bool = False  # a role that is not trained, whose parameters are another's base
    offload: bool | None = None  # None: where roles share devices and it is not trained


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A step: its calls in the order in which they are dispatched, and the models they are on."""

    calls: tuple[CallWork, ...]
    roles: Mapping[str, RoleWork]

    def calls_on(self, role: str) -> tuple[CallWork, ...]:
        """Returns a role's calls."""
        return tuple(call for call in self.calls if call.role == role)

    def home_call(self, role: str) -> CallWork:
        """Returns the call in whose layout a role's parameters stay: the one that trains it, else its first."""
        calls = self.calls_on(role)
        return next((call for call in calls if call.kind == "train"), calls[0])
