"""The calls of a step, by kind, and the graph that follows from the keys they pass on. Nothing here knows a device."""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import networkx as nx
import numpy as np

from realjax.core.draw import Draw
from realjax.core.generation_config import GenerationConfig
from realjax.core.host_call import Arrays, HostFn, HostResult
from realjax.core.loss import Loss
from realjax.dataflow.turns import Turns


@dataclass(frozen=True, kw_only=True)
class MicroBatches:
    """The parts in which a call computes its batch: `count`, or the fewest of at most `max_tokens`. Neither: one."""

    count: int | None = None
    max_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Minibatches:
    """How a training call splits its batch into several updates."""

    count: int = 1
    passes: int = 1  # over the batch
    shuffle: bool = True  # sequences to minibatches anew in each pass, from (seed, step, pass)


@dataclass(frozen=True, kw_only=True)
class ModelCall:
    """A call on a role's model: it reads `inputs` of the batch and adds `outputs` to it."""

    name: str
    role: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...] = ()
    # Of inputs that come from an earlier step: how many steps before.
    delays: Mapping[str, int] = field(default_factory=dict)
    # The longest sequence that the call can meet or make; attention then looks no further back.
    max_seqlen: int | None = None
    placed_as: str | None = None  # the options that say where it runs; None: those of its own name

    @property
    def placement(self) -> str:
        """The name of the options that say where it runs."""
        return self.placed_as or self.name


@dataclass(frozen=True, kw_only=True)
class Generate(ModelCall):
    """Continues prompts. It makes a batch of its own, of whole sequences, that the calls after it read."""

    config: GenerationConfig
    eos_ids: tuple[int, ...]
    num_prompts: int = 1  # the most of a step
    num_samples: int = 1  # of each prompt
    has_baseline: bool = False  # one greedy sample of each prompt besides
    num_slots: int | None = None  # rows decoded at once; None: as many as a step has, within bounds
    # When so few rows are left to decode, more devices share each layer; 0: never; None: never, if no planner says so.
    tail_slots: int | None = None
    tail_tp: int | None = None  # how many do; None: the most that divide the model
    num_tokens: int | None = None  # only the first so many are drawn, see `core.draw.Draw`; None: any
    records_routes: bool = False  # the experts that tokens go to, see `core.routes.Routes`
    repeats: bool = False  # a prompt's samples are the same in every step
    # Where its keys are read a step later: how many steps ahead of its training a row may be begun.
    num_ahead: int = 1
    # fn(row_id, sample_id) -> the tokens of an answer that is given instead of drawn, or None.
    given_fn: Callable[[int, int], np.ndarray | None] | None = None
    # fn(prompt, tokens, num_seen) -> whether the tokens hold a text that ends an answer, see `core.texts.make_stop_fn`.
    stop_fn: Callable[[np.ndarray, np.ndarray, int], bool] | None = None

    turns: Turns | None = None  # None: a prompt is answered once

    @property
    def needs_one_stage(self) -> bool:
        """Whether its rows cannot be decoded in pipeline stages: experts are recorded, or tokens proposed."""
        return self.records_routes or bool(self.config.prompt_lookup_num_tokens)

    @property
    def answers_per_prompt(self) -> int:
        """Samples of each prompt, the baseline counted."""
        return self.num_samples + self.has_baseline

    @property
    def num_answers(self) -> int:
        """The most of a step."""
        return self.num_prompts * self.answers_per_prompt


@dataclass(frozen=True, kw_only=True)
class Inference(ModelCall):
    """Computes the outputs of a head for every token: one key for each, in their order."""

    head: str  # which, see `core.loss.Readout`
    # Of the vocabulary's heads: the key of a mask, known on the host, of the tokens that anyone asks about; None: all.
    mask: str | None = None
    only: str | None = None  # the key, known on the host, of the sequences that it computes; of the others it gives 0
    draw: Draw = Draw()  # of the vocabulary's heads: the distribution that the tokens were drawn from
    num_choices: int | None = None  # head `choices`
    micro_batches: MicroBatches = MicroBatches()


@dataclass(frozen=True, kw_only=True)
class Train(ModelCall):
    """Updates the role's parameters."""

    loss: Loss
    mask: str | None = None  # as for `Inference`
    minibatches: Minibatches | None = None  # None is one update of the whole batch, as it is packed
    micro_batches: MicroBatches = MicroBatches()

    @property
    def head(self) -> str:
        """What the loss reads of the model, as for `Inference`."""
        return self.loss.head

    @property
    def num_updates(self) -> int:
        """Updates that a step makes."""
        return self.minibatches.count * self.minibatches.passes if self.minibatches else 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Host:
    """A step on the host between model calls. Its state, a few numbers, goes from step to step and into the saves."""

    name: str
    fn: HostFn
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    delays: Mapping[str, int] = field(default_factory=dict)
    state: Mapping[str, float] = field(default_factory=dict)  # before the first step
    metrics: tuple[str, ...] = ()  # that it reports in an evaluation
    # Runs in a thread while calls that do not need its keys go on, in the first process, whose result the others get.
    is_beside: bool = False
    # fn(arrays of each batch) -> their results: of an evaluation, where what it finds is of the whole set.
    pool_fn: Callable[[Sequence[Arrays]], Sequence[HostResult]] | None = None


Call = Generate | Inference | Train | Host


@dataclass(frozen=True)
class DataflowGraph:
    """The calls of one step. An edge u -> v exists for every key that u writes and v reads in the same step.

    Keys that no call writes come from the dataset (`dataset_keys`). Raises ValueError for a name or key made twice, a
    key that nobody makes, a key of an earlier step that no call makes, a cycle, or two training calls of one role.
    """

    calls: tuple[Call, ...]
    dataset_keys: frozenset[str]

    def __post_init__(self) -> None:
        _refuse_repeats("call name", [call.name for call in self.calls])
        _refuse_repeats("key", [*(key for call in self.calls for key in call.outputs), *self.dataset_keys])
        _refuse_repeats("training call of role", [mfc.role for mfc in self.mfcs if isinstance(mfc, Train)])
        for call in self.calls:
            if orphans := set(call.inputs) - set(self.producers) - self.dataset_keys:
                raise ValueError(
                    f"dataflow graph: call '{call.name}' reads {sorted(orphans)}, which no call writes and the dataset "
                    f"does not hold (it holds {sorted(self.dataset_keys)}); add a call with that output, or the "
                    "dataset key"
                )
            self._check_delays(call)
        if not nx.is_directed_acyclic_graph(self.edges):
            cycle = " -> ".join(u for u, _ in nx.find_cycle(self.edges))
            raise ValueError(f"dataflow graph: {cycle} wait for each other; remove one of their inputs")

    def _check_delays(self, call: Call) -> None:
        for key, delay in call.delays.items():
            if key not in call.inputs or key not in self.producers or delay != 1:
                raise ValueError(
                    f"dataflow graph: call '{call.name}' takes '{key}' of {delay} steps before; that can be an input "
                    "that a call writes, and 1"
                )

    @cached_property
    def mfcs(self) -> tuple[Generate | Inference | Train, ...]:
        """The calls on models, as they were listed."""
        return tuple(call for call in self.calls if not isinstance(call, Host))

    @cached_property
    def producers(self) -> dict[str, str]:
        """The call that writes each key."""
        return {key: call.name for call in self.calls for key in call.outputs}

    @cached_property
    def edges(self) -> nx.DiGraph:
        """The graph over call names; each edge has the keys that travel along it within a step."""
        graph = nx.DiGraph()
        graph.add_nodes_from(call.name for call in self.calls)
        for call in self.calls:
            for key in call.inputs:
                if key in self.producers and key not in call.delays:
                    source = self.producers[key]
                    keys = graph.get_edge_data(source, call.name, {"keys": ()})["keys"]
                    graph.add_edge(source, call.name, keys=(*keys, key))
        return graph

    @cached_property
    def ahead(self) -> frozenset[str]:
        """The calls that work for the next step: those that neither read a key of the step before nor wait for one that
        does. None where no key is of the step before.
        """
        late = {call.name for call in self.calls if call.delays}
        late |= {name for first in late for name in nx.descendants(self.edges, first)}
        return frozenset({call.name for call in self.calls} - late) if late else frozenset()

    @cached_property
    def order(self) -> tuple[Call, ...]:
        """The calls in an order in which every input exists; ties as they were listed.

        The host's come after the models' that can begin as well: when the host gets to wait for what it reads, all
        devices have their work. Those that work for the next step come last. So do those that wait for one that runs
        beside others.
        """
        beside = [call.name for call in self.calls if isinstance(call, Host) and call.is_beside]
        late = {name for first in beside for name in nx.descendants(self.edges, first)}

        def list_reasons(call: Call) -> tuple[bool, ...]:
            is_ahead, waits = call.name in self.ahead, isinstance(call, Host) and not call.is_beside
            return is_ahead, is_ahead and waits, call.name in late, waits

        rank = {call.name: (*list_reasons(call), i) for i, call in enumerate(self.calls)}
        by_name = {call.name: call for call in self.calls}
        return tuple(by_name[name] for name in nx.lexicographical_topological_sort(self.edges, key=rank.__getitem__))

    @property
    def roles(self) -> tuple[str, ...]:
        """Role names in the order of their first call."""
        return tuple(dict.fromkeys(mfc.role for mfc in self.mfcs))

    def num_updates(self, role: str) -> int:
        """Returns the updates that a step makes to a role."""
        call = self.train_call(role)
        return call.num_updates if call else 1

    def train_call(self, role: str) -> Train | None:
        """Returns the call that trains `role`, None for a role that is never trained."""
        return next((mfc for mfc in self.mfcs if isinstance(mfc, Train) and mfc.role == role), None)


def put_ahead(calls: Sequence[Call], ahead: Container[str], num_steps: int) -> tuple[Call, ...]:
    """Returns the calls where those named in `ahead` work for the next step while the others do this one.

    `num_steps` is how many steps ahead of its training a row may be begun.
    """
    made = {key for call in calls if call.name in ahead for key in call.outputs}

    def one(call: Call) -> Call:
        if call.name not in ahead:
            return replace(call, delays={key: 1 for key in call.inputs if key in made})
        return replace(call, num_ahead=num_steps) if isinstance(call, Generate) else call

    return tuple(map(one, calls))


def _refuse_repeats(what: str, names: Sequence[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"dataflow graph: {what} {', '.join(repeated)} appears twice; each may appear once")
