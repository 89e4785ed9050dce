"""The description of a whole run: what an experiment makes of its options and the runtime carries out."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from realjax.core.compute import Compute
from realjax.core.end_tokens import EndTokens
from realjax.core.identity import Identity
from realjax.core.layout import ParallelStrategy
from realjax.core.loss import Loss
from realjax.core.optimizer_config import OptimizerConfig
from realjax.core.planner_config import PlannerConfig
from realjax.data.loader import Loader
from realjax.dataflow.graph import Call, DataflowGraph, Generate, Host, Inference, MicroBatches, Train
from realjax.models.config import ModelConfig

Tokens = Sequence[Sequence[int]]
# fn(prompts, answers) -> the texts of both, as `core.texts.decode_answers` gives them.
DecodeFn = Callable[[Tokens, Tokens], tuple[list[str], list[str]]]


@dataclass(frozen=True, kw_only=True)
class RoleSpec:
    """One model of a run: what it is, where it comes from and how it computes."""

    name: str
    path: Path  # local directory with config and tokenizer, and weights unless from scratch
    config: ModelConfig  # of the model that is run, which for a critic is not the directory's
    size: int = 0  # billions of parameters that it was declared with; allocation by rule goes by them
    init_from_scratch: bool = False
    init_critic_from_actor: bool = False
    compute: Compute = Compute()
    optimizer: OptimizerConfig | None = None
    term_coefs: Mapping[str, float] = field(default_factory=dict)  # see `engine.train.TrainOptions`
    zero_stage: int = 0  # where it is trained, see `core.layout.ParallelStrategy`
    is_averaged: bool = False  # follows another role (`MovingAverage`): kept in float32, or small steps would be lost
    offload: bool | None = None  # parameters in host memory between calls; None: where roles share devices
    # Which of `zero_stage` and `compute.remat` nobody asked for: a planner may decide otherwise.
    undecided: frozenset[str] = frozenset()
    ends: EndTokens | None = None  # of the texts that it is trained on; its checkpoints name them
    # What names the parameters that it does not train, where it has adapters or is what another's adapters are beside:
    # roles with the same have these in common. None: all its parameters are its own.
    base: str | None = None
    adapter: Path | None = None  # directory that its adapters begin with, as PEFT saves them; None: at random
    merged: Path | None = None  # directory of adapters that are merged into the weights where these are read
    merges_adapters: bool = False  # answers are drawn from merged weights, not from weights and adapters

    @property
    def title(self) -> str:
        """What an error calls it."""
        return f"role {self.name} ('{self.path}')"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A loss measured on held-out batches with a role's current parameters, after calls whose keys it reads."""

    role: str
    loss: Loss
    loader: Loader
    calls: tuple[Inference | Host, ...] = ()
    name: str = "evaluation"  # whose options the micro-batches are, in errors
    micro_batches: MicroBatches = MicroBatches()  # as those of the call that trains the role


@dataclass(frozen=True, kw_only=True)
class RolloutEvaluation:
    """Calls run on held-out prompts, in order; the metrics of the host calls among them are the result.

    `variants` names several ways to answer, such as greedy and sampled.
    """

    role: str
    variants: Mapping[str, tuple[Call, ...]]
    loader: Loader
    is_for_ends: bool = False  # before the first step and after the last, whatever the frequency

    @property
    def calls(self) -> Iterable[Call]:
        """Those of all variants."""
        return (call for calls in self.variants.values() for call in calls)


@dataclass(frozen=True, kw_only=True)
class MovingAverage:
    """A role that follows another: after each step, role = eta * source + (1 - eta) * role."""

    role: str
    source: str
    eta: float


@dataclass(frozen=True, kw_only=True)
class DynamicSampling:
    """Prompts are drawn again until a step has as many as it wants whose answers differ in `rewards`.

    At most `max_draws` times; then a step goes on with those that it has, or, where there are none and `stops`, ends
    the run.
    """

    max_draws: int
    stops: bool = False


@dataclass(frozen=True, kw_only=True)
class AnswerFile:
    """The answers of a step's generate call, written to a file of JSON lines in the order of the prompts."""

    name: str  # in the log directory
    rows: Sequence[Mapping[str, object]]  # the data's, by prompt_id
    num_samples: int  # of each prompt
    stop: tuple[str, ...]  # an answer's text ends before the first of these


@dataclass(frozen=True, kw_only=True)
class RolloutRecord:
    """What a run shows and keeps of the answers that it learns from."""

    log_steps: int | None = None  # some are logged after the first step and every so many; None: none
    num_logged: int = 1
    keeps_all: bool = False
    terms: tuple[str, ...] = ()  # names of the entries of `reward_terms`


@dataclass(frozen=True, kw_only=True)
class Frequency:
    """When something happens: every so many epochs, at their ends, or steps, or seconds. None: not by that."""

    epochs: int | None = None
    steps: int | None = None
    secs: float | None = None

    @property
    def is_set(self) -> bool:
        return any((self.epochs, self.steps, self.secs))


def join_names(*names: str) -> str:
    """Returns the name of a metric: its set, where that has a name, and so on."""
    return "/".join(name for name in names if name)


METRICS_FILE = "metrics.jsonl"  # of a run's log directory: the record of its steps


@dataclass(frozen=True, kw_only=True)
class RunPaths:
    """Directories of a run, beneath fileroot; none of them need exist."""

    logs: Path
    checkpoints: Path
    recover: Path
    compilation_cache: Path
    plans: Path


@dataclass(frozen=True, kw_only=True)
class CallPlacement:
    """Where the user wants a call, for the modes of allocation that ask: how it is split, and on which devices."""

    strategy: ParallelStrategy
    device_mesh: str | None = None  # such as NODE01:0,1; None: all
    devices: tuple[int, ...] | None = None  # by number, of a call that a planner has placed


@dataclass(frozen=True, kw_only=True)
class AllocationOptions:
    """The machines, and how calls are to be laid out on them; `allocation.allocate` reads it."""

    mode: str
    n_nodes: int
    n_gpus_per_node: int
    nodelist: str | None = None
    calls: Mapping[str, CallPlacement]  # by the name of the call's options
    planner: PlannerConfig = PlannerConfig()
    use_cache: bool = False  # of plans that were searched before

    @property
    def num_devices(self) -> int:
        return self.n_nodes * self.n_gpus_per_node

    @property
    def machine(self) -> str:
        """Nodes x devices of each, such as 2x8."""
        return f"{self.n_nodes}x{self.n_gpus_per_node}"


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """Everything there is to know of a run but where its calls run. Frozen: the run changes none of it."""

    experiment: str
    title: str
    config_json: str
    identity: Identity
    paths: RunPaths
    graph: DataflowGraph
    allocation: AllocationOptions
    roles: Mapping[str, RoleSpec]
    loader: Loader
    num_epochs: int
    schedule_epochs: int | None = None  # over which learning rates decay; None: all
    evaluations: Mapping[str, Evaluation | RolloutEvaluation] = field(default_factory=dict)  # by set; "": has no name
    # `[<set>/]<variant>/<metric>` of what rollouts are worth, by which a role's best checkpoint is kept: the higher.
    best_metric: str | None = None
    save: Frequency
    evaluate: Frequency
    seed: int
    averages: tuple[MovingAverage, ...] = ()
    sampling: DynamicSampling | None = None  # None: a step takes the loader's batch, whatever is answered
    answers: AnswerFile | None = None
    rollouts: RolloutRecord | None = None
    decode_fn: DecodeFn | None = None  # where a run shows texts
    benchmark_steps: int | None = None
    recover_mode: str = "disabled"
    max_recover_saves: int = 2
    keep_every: int | None = None  # saves after such steps stay besides
    max_nonfinite_steps: int = 5
    watchdog_seconds: float | None = None  # no process may be without progress for longer than bounds above this
    watchdog_compile_seconds: float | None = None  # the bound of a program that compiles; None: twelve times the other
    wandb_mode: str = "disabled"
    wandb_project: str = "realjax"
    max_shard_bytes: float = 5e9

    @property
    def schedule_steps(self) -> int:
        """Steps over which learning rates decay."""
        if self.schedule_epochs is None:
            return self.loader.total_steps
        return self.loader.steps_in(self.schedule_epochs)

    @property
    def mfcs(self) -> tuple[Generate | Inference | Train, ...]:
        """The calls on models: the graph's, then the evaluation's own."""
        evaluated = [call for evaluation in self.evaluations.values() for call in evaluation.calls]
        calls = {call.name: call for call in (*self.graph.calls, *evaluated) if not isinstance(call, Host)}
        return tuple(calls.values())
