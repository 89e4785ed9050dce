"""The description of a whole run: what an experiment makes of its options and the runtime carries out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from realjax.core.end_tokens import EndTokens
from realjax.core.identity import Identity
from realjax.core.layout import Layout
from realjax.core.loss import Loss
from realjax.core.optimizer_config import OptimizerConfig
from realjax.data.loader import Loader
from realjax.dataflow.graph import MFC, DataflowGraph, HostCall

Tokens = Sequence[Sequence[int]]
# fn(prompts, answers) -> the texts of both, as `core.texts.decode_answers` gives them.
DecodeFn = Callable[[Tokens, Tokens], tuple[list[str], list[str]]]


@dataclass(frozen=True, kw_only=True)
class RoleSpec:
    """One model of a run: where it comes from and how it computes."""

    name: str
    path: Path  # local directory with config and tokenizer, and weights unless from scratch
    is_critic: bool = False
    init_from_scratch: bool = False
    init_critic_from_actor: bool = False
    compute_dtype: str = "float32"
    attention: str = "auto"
    remat: bool = True
    unroll: bool | None = None  # every layer compiled by itself; None: where it pays
    loss_chunk_tokens: int | None = None
    optimizer: OptimizerConfig | None = None
    is_averaged: bool = False  # follows another role (`MovingAverage`): kept in float32, or small steps would be lost
    offload: bool | None = None  # parameters in host memory between calls; None: where roles share devices
    ends: EndTokens | None = None  # of the texts that it is trained on; its checkpoints name them
    num_empty_layers: int = 0  # behind the model's own, so that the pipeline stages of its calls are equal

    @property
    def title(self) -> str:
        """What an error calls it."""
        return f"role {self.name} ('{self.path}')"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A loss measured on held-out batches with a role's current parameters, after inference calls that it reads."""

    role: str
    loss: Loss
    loader: Loader
    calls: tuple[MFC, ...] = ()
    name: str = "evaluation"  # whose options the micro-batches are, in errors
    num_mbs: int | None = None  # as those of the call that trains the role
    max_tokens_per_mb: int | None = None


@dataclass(frozen=True, kw_only=True)
class RolloutEvaluation:
    """Calls run on held-out prompts, in order; the metrics of the host calls among them are the result.

    `variants` names several ways to answer, such as greedy and sampled. `best_metric`, `<variant>/<metric>`, decides
    which checkpoint of `role` is kept as the best: the higher the better.
    """

    role: str
    variants: Mapping[str, tuple[MFC | HostCall, ...]]
    loader: Loader
    best_metric: str | None = None


@dataclass(frozen=True, kw_only=True)
class MovingAverage:
    """A role that follows another: after each step, role = eta * source + (1 - eta) * role."""

    role: str
    source: str
    eta: float


@dataclass(frozen=True, kw_only=True)
class Frequency:
    """When something happens: every so many epochs, at their ends, or steps, or seconds. None: not by that."""

    epochs: int | None = None
    steps: int | None = None
    secs: float | None = None

    @property
    def is_set(self) -> bool:
        return any((self.epochs, self.steps, self.secs))


@dataclass(frozen=True, kw_only=True)
class RunPaths:
    """Directories of a run, beneath fileroot; none of them need exist."""

    logs: Path
    checkpoints: Path
    recover: Path
    compilation_cache: Path


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """Everything the runtime needs to know of a run. Frozen: the run changes none of it."""

    experiment: str
    title: str
    config_json: str
    identity: Identity
    paths: RunPaths
    graph: DataflowGraph
    layouts: Mapping[str, Layout]  # by call name
    roles: Mapping[str, RoleSpec]
    loader: Loader
    num_epochs: int
    schedule_epochs: int | None = None  # over which learning rates decay; None: all
    evaluation: Evaluation | RolloutEvaluation | None
    save: Frequency
    evaluate: Frequency
    seed: int
    averages: tuple[MovingAverage, ...] = ()
    decode_fn: DecodeFn | None = None  # where a run shows samples
    benchmark_steps: int | None = None
    recover_mode: str = "disabled"
    max_recover_saves: int = 2
    max_nonfinite_steps: int = 5
    wandb_mode: str = "disabled"
    max_shard_bytes: float = 5e9

    @property
    def schedule_steps(self) -> int:
        """Steps over which learning rates decay."""
        return self.loader.steps_in(self.schedule_epochs or self.num_epochs)
