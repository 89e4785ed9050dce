"""What a model is: its sizes, and its layers as a pattern of kinds. No weights, no mesh, no precision."""

from dataclasses import dataclass, replace
from typing import Literal

from realjax.core.lora_config import OF_FEED_FORWARD, LoRAConfig
from realjax.core.routes import Routes

Activation = Literal["silu", "gelu_tanh", "gelu"]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding, see `models/rope.py`. Raises ValueError where it cannot be computed."""

    theta: float = 10000.0
    scaling: Literal["none", "linear", "dynamic", "llama3", "yarn", "longrope"] = "none"
    fraction: float = 1.0  # how much of a head turns, from its beginning
    factor: float = 1.0  # of `longrope`: the model's positions over the original ones
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192  # llama3, yarn, longrope
    attention_factor: float = 1.0  # of cosines and sines: yarn, longrope
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()  # longrope: one for each pair of dims
    long_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(
                f"model config: a fraction of {self.fraction:g} of each head turns; it must be above 0, up to 1"
            )
        if self.scaling in ("yarn", "longrope") and (self.theta <= 1 or self.original_max_positions < 2):
            raise ValueError(
                f"model config: {self.scaling} with theta {self.theta:g} and {self.original_max_positions} original "
                "positions; it needs both above 1"
            )

    def count_dims(self, head_dim: int) -> int:
        """Returns how many dims of a head turn."""
        return int(head_dim * self.fraction)


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """RMS norm (arXiv:1910.07467), or layer norm with scale and bias (arXiv:1607.06450).

    With `one_plus` the scale of an RMS norm is 1 + what is learned, as in Gemma.
    """

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-5
    one_plus: bool = False

    def __post_init__(self) -> None:
        if self.one_plus and self.kind != "rms":
            raise ValueError(f"norm config: one_plus with kind='{self.kind}'; only an RMS norm's scale is 1 + learned")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """How the tokens of a layer read each other."""

    window: int | None = None  # a token sees itself and the window-1 tokens before it
    softcap: float | None = None  # scores s are softcap * tanh(s / softcap)
    scale: float | None = None  # of scores; None: head_dim**-0.5
    sinks: bool = False  # each head learns a logit that takes its share of every softmax (arXiv:2309.17453)
    rope: RopeConfig | None = RopeConfig()  # None: a token does not know its position
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: NormConfig | None = None  # over each head of q and k, before rotary
    qk_norm_whole: bool = False  # that norm is over all heads of q together, and over all of k


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """A feed-forward, gated or of two products."""

    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Gated feed-forwards of which a router chooses some for each token (experts), without a limit to their load.

    Raises ValueError when sizes do not fit together.
    """

    num_experts: int
    experts_per_token: int
    expert_size: int
    # Of all experts' scores, of which the best are chosen; or of those that have the best logits, among themselves.
    scores: Literal["softmax", "sigmoid", "softmax_of_chosen"] = "softmax"
    renormalise: bool = False  # the weights of a token's experts sum to 1
    scale: float = 1.0  # of the weights, last of all
    router_bias: bool = False
    has_offset: bool = False  # added to the scores where experts are chosen, not in their weights; never trained
    # Experts in a row are a group. Those are chosen from a token's best groups, by each one's two best scores.
    num_groups: int = 1
    groups_per_token: int = 1
    activation: Activation = "silu"
    bias: bool = False
    # With a limit, gate and up are cut there, and an expert is (up + 1) * gate * sigmoid(alpha * gate).
    limit: float | None = None
    alpha: float = 1.0
    shared_size: int | None = None  # of a feed-forward beside the experts that every token goes through
    shared_gate: bool = False  # it is weighed by a sigmoid of its own
    balance_coef: float = 0.0  # of `balance_loss` in training, see `models/moe.py`

    def __post_init__(self) -> None:
        for name in ("num_experts", "experts_per_token", "expert_size", "num_groups", "groups_per_token"):
            if (size := getattr(self, name)) < 1:
                raise ValueError(f"model config: {name}={size}; it must be at least 1")
        if self.num_experts % self.num_groups or self.groups_per_token > self.num_groups:
            raise ValueError(
                f"model config: {self.groups_per_token} of {self.num_groups} groups of {self.num_experts} experts; "
                "groups must be equal, and no more of them chosen than there are"
            )
        if self.experts_per_token > (most := self.num_experts // self.num_groups * self.groups_per_token):
            raise ValueError(
                f"model config: {self.experts_per_token} experts for a token, of {most} that it can have; "
                "num_experts_per_tok must not be larger"
            )


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """One kind of layer. `attn_post_norm` and `mlp_post_norm` are over what is added to the residual, times
    `residual_scale`.
    """

    name: str = "full"  # of its own in a pattern; stacks of parameters are called by it
    mixer: AttentionConfig = AttentionConfig()
    feed_forward: MLPConfig | MoEConfig = MLPConfig()
    attn_norm: NormConfig | None = NormConfig()
    attn_post_norm: NormConfig | None = None
    mlp_norm: NormConfig | None = NormConfig()
    mlp_post_norm: NormConfig | None = None
    residual_scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer. Raises ValueError when sizes or layers do not fit together."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    max_positions: int
    # Layer i is of kind i modulo its length. Layers of one kind are one stack of parameters, in their order.
    pattern: tuple[LayerKind, ...] = (LayerKind(),)
    norm: NormConfig = NormConfig()  # behind the last layer
    tied: bool = False  # the head is the embedding table
    embed_scale: float | None = None  # embedded tokens are multiplied by it
    learned_positions: bool = False  # a table of `max_positions` rows, which are added to the embedded tokens
    logit_softcap: float | None = None  # logits of the vocabulary are c * tanh(logits / c)
    logit_scale: float = 1.0  # of the logits of a vocabulary
    is_critic: bool = False  # a scalar head instead of the vocabulary's
    # Layers of zeros at the end of the stack, which make pipeline stages equal. Identities, no part of the model.
    num_empty_layers: int = 0
    # Beside the weights, which are then not trained but for a critic's head. No part of a checkpoint's config.json.
    lora: LoRAConfig | None = None

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
        if self.ropes and self.head_dim % 2:
            raise ValueError(f"model config: head_dim={self.head_dim} is odd; rotary embedding needs an even head size")
        if self.is_critic and self.tied:
            raise ValueError("model config: a critic has its own scalar head and cannot be tied to the embedding")
        self._check_pattern()
        self._check_adapters()
        for rope in self.ropes:
            self._check_rope(rope)

    def _check_rope(self, rope: RopeConfig) -> None:
        if (size := rope.count_dims(self.head_dim)) % 2 or not size:
            raise ValueError(
                f"model config: {size} of head_dim={self.head_dim} dims turn ({rope.fraction:g} of them); rotary "
                "embedding needs an even number"
            )
        for name, factors in (("short", rope.short_factors), ("long", rope.long_factors)):
            if rope.scaling == "longrope" and len(factors) != size // 2:
                raise ValueError(
                    f"model config: longrope has {len(factors)} {name} factors; it needs {size // 2}, one for each "
                    f"pair of the {size} dims of a head that turn"
                )

    def _check_pattern(self) -> None:
        if not 0 < len(self.pattern) <= self.num_layers:
            raise ValueError(
                f"model config: a pattern of {len(self.pattern)} layers for {self.num_layers}; it must have at least 1 "
                "and no more than the model"
            )
        if unequal := [kind.name for kind in self.pattern if kind != self.kinds[kind.name]]:
            raise ValueError(f"model config: two different kinds of layer are called '{unequal[0]}'; name them apart")
        if not all(name.isidentifier() for name in self.kinds):
            raise ValueError(f"model config: layers are called {list(self.kinds)}; use letters, digits and _")
        if any(isinstance(x := kind.feed_forward, MoEConfig) and x != self.experts for kind in self.pattern):
            raise ValueError("model config: layers with different experts or routers; they must all be alike")
        if self.num_empty_layers and len(self.kinds) > 1:
            raise ValueError(
                f"model config: num_empty_layers={self.num_empty_layers} with layers of several kinds "
                f"({', '.join(self.kinds)}); it must be 0"
            )

    def _check_adapters(self) -> None:
        if self.lora is None:
            return
        if self.experts is not None and (found := OF_FEED_FORWARD & set(self.lora.targets)):
            raise ValueError(
                f"lora.targets: found {' '.join(sorted(found))} for a model with experts, which cannot have adapters; "
                "use those of attention: q k v o"
            )
        is_plain = not any(isinstance(x := kind.feed_forward, MLPConfig) and x.gated for kind in self.pattern)
        if "gate" in self.lora.targets and self.experts is None and is_plain:
            raise ValueError(
                "lora.targets: found gate for a model whose feed-forwards have none; leave it out: q k v o up down"
            )

    def find_adapter(self, target: str) -> LoRAConfig | None:
        """Returns the adapter of the maps of that name, None where they have none."""
        return self.lora if self.lora is not None and target in self.lora.targets else None

    @property
    def num_stacked_layers(self) -> int:
        """The length of the stack of parameters: the model's layers, then the empty ones."""
        return self.num_layers + self.num_empty_layers

    @property
    def kinds(self) -> dict[str, LayerKind]:
        """The different kinds of layer by name, in the order of their first layers."""
        return {kind.name: kind for kind in self.pattern}

    @property
    def order(self) -> tuple[str, ...]:
        """The kind of every layer of the stacks, in the order in which they run."""
        return tuple(self.pattern[i % len(self.pattern)].name for i in range(self.num_stacked_layers))

    @property
    def layers(self) -> tuple[LayerKind, ...]:
        """The kind of every layer, without empty ones."""
        return tuple(self.kinds[name] for name in self.order[: self.num_layers])

    @property
    def routed_layers(self) -> tuple[int, ...]:
        """The numbers of the layers with experts."""
        return tuple(i for i, kind in enumerate(self.layers) if isinstance(kind.feed_forward, MoEConfig))

    @property
    def experts(self) -> MoEConfig | None:
        """What layers with experts have, all of them alike; None in a model without."""
        return next((kind.feed_forward for kind in self.pattern if isinstance(kind.feed_forward, MoEConfig)), None)

    @property
    def routes(self) -> Routes | None:
        """How the experts that a token goes to are stored; None in a model without."""
        if self.experts is None:
            return None
        return Routes(len(self.routed_layers), self.experts.experts_per_token, self.experts.num_experts)

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The different rotary embeddings of the layers."""
        return tuple(dict.fromkeys(kind.mixer.rope for kind in self.pattern if kind.mixer.rope is not None))

    def count_empty_layers(self, num_stages: int) -> int:
        """Returns how many empty layers make as many pipeline stages equal. Raises ValueError where none do."""
        num_empty = -self.num_layers % num_stages if len(self.kinds) == 1 else 0
        cut_order(replace(self, num_empty_layers=num_empty).order, num_stages)
        return num_empty

    def as_critic(self) -> "ModelConfig":
        """Returns the same trunk with a scalar head."""
        return replace(self, is_critic=True, tied=False)

    def without_adapters(self) -> "ModelConfig":
        """Returns the same model without adapters, as its checkpoint is."""
        return replace(self, lora=None)


# Places of a window's ring come in a multiple of this: products over them then are whole tiles.
RING_MULTIPLE = 16


def count_places(window: int | None, length: int) -> int:
    """Returns the places that a layer's cache has for rows of up to `length` tokens: no more than its window needs."""
    return length if window is None else min(length, -(-window // RING_MULTIPLE) * RING_MULTIPLE)


def find_lookup_fault(config: ModelConfig, num_tokens: int, num_stages: int) -> str | None:
    """Returns why rows cannot take in `num_tokens` proposed ones beside their last; None where they can."""
    found = f"prompt_lookup_num_tokens={num_tokens}"
    if num_stages > 1:
        return f"{found} needs one pipeline stage, and there are {num_stages}; leave it out, or have one"
    # What a round writes may not take the place of what a token of the round sees.
    spare = {-kind.mixer.window % RING_MULTIPLE for kind in config.pattern if kind.mixer.window is not None}
    if num_tokens > min(spare, default=num_tokens):
        return f"{found}: a layer with a window has places for {min(spare)} more tokens; lower it to that, or to null"
    return None


def list_cuts(order: tuple[str, ...]) -> list[int]:
    """Returns the numbers of pipeline stages that all have layers of the same kinds in the same order."""
    return [n for n in range(1, len(order) + 1) if order == order[: len(order) // n] * n]


def cut_order(order: tuple[str, ...], num_stages: int) -> tuple[str, ...]:
    """Returns the kinds of a stage's layers. Raises ValueError where `list_cuts` does not have that number."""
    if num_stages not in (cuts := list_cuts(order)):
        raise ValueError(
            f"{num_stages} pipeline stages of {len(order)} layers ({', '.join(dict.fromkeys(order))}) would not have "
            f"layers of the same kinds in the same order; use a pipeline_parallel_size among {cuts}"
        )
    return order[: len(order) // num_stages]
