"""Model function calls (MFCs), the host calls between them, and the graph that follows from the keys they pass on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import networkx as nx

from realjax.core.draw import Draw
from realjax.core.generation_config import GenerationConfig
from realjax.core.host_call import HostFn
from realjax.core.loss import Loss

Call = Literal["generate", "inference", "train_step"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a generate call continues its prompts."""

    config: GenerationConfig
    eos_ids: tuple[int, ...]
    row_len: int  # T of the batch that is made
    num_samples: int = 1  # of each prompt
    num_slots: int | None = None  # rows decoded at once; None: as many as the first batch has, within bounds
    has_baseline: bool = False  # one greedy sample of each prompt besides
    num_tokens: int | None = None  # only the first so many are drawn, see `core.draw.Draw`; None: any


@dataclass(frozen=True, kw_only=True)
class Minibatches:
    """How a training call splits its batch into several updates."""

    count: int = 1
    passes: int = 1  # over the batch
    shuffle: bool = True  # sequences to minibatches anew in each pass, from (seed, step, pass)


@dataclass(frozen=True, kw_only=True)
class MFC:
    """One call on one role: it reads `inputs` of the batch and adds `outputs` to it.

    A generate call reads prompts and makes a batch of its own, of whole sequences, that the calls after it read.
    """

    name: str
    role: str
    call: Call
    inputs: tuple[str, ...]
    outputs: tuple[str, ...] = ()
    sampling: Sampling | None = None  # generate
    loss: Loss | None = None  # train_step: what is minimised
    minibatches: Minibatches | None = None  # train_step: None is one update of the whole batch, as it is packed
    head: str | None = None  # inference: which output of the model, see `core.loss.Loss`
    # Head `logprobs`: the key of a mask, known on the host, of the tokens that anyone asks about; None: all are.
    mask: str | None = None
    draw: Draw = Draw()  # inference, head `logprobs`: the distribution that the tokens were drawn from
    num_mbs: int | None = None  # micro-batches; None: one, or as many as `max_tokens_per_mb` asks for
    max_tokens_per_mb: int | None = None
    # The longest sequence that the call can meet or make; attention then looks no further back.
    max_seqlen: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class HostCall:
    """A step on the host between model calls. Its state, a few numbers, goes from step to step and into the saves."""

    name: str
    fn: HostFn
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    state: Mapping[str, float] = field(default_factory=dict)  # before the first step
    metrics: tuple[str, ...] = ()  # that it reports in an evaluation


@dataclass(frozen=True)
class DataflowGraph:
    """The calls of one step. An edge u -> v exists for every key that u writes and v reads.

    Keys that no call writes come from the dataset (`dataset_keys`). Raises ValueError for a name or key made twice,
    a key that nobody makes, a cycle, or two training calls of one role.
    """

    calls: tuple[MFC | HostCall, ...]
    dataset_keys: frozenset[str]

    def __post_init__(self) -> None:
        _refuse_repeats("call name", [call.name for call in self.calls])
        _refuse_repeats("key", [*(key for call in self.calls for key in call.outputs), *self.dataset_keys])
        _refuse_repeats("training call of role", [mfc.role for mfc in self.mfcs if mfc.call == "train_step"])
        for call in self.calls:
            if orphans := set(call.inputs) - set(self.producers) - self.dataset_keys:
                raise ValueError(
                    f"dataflow graph: call '{call.name}' reads {sorted(orphans)}, which no call writes and the dataset "
                    f"does not hold (it holds {sorted(self.dataset_keys)}); add a call with that output, or the "
                    "dataset key"
                )
        if not nx.is_directed_acyclic_graph(self.edges):
            cycle = " -> ".join(u for u, _ in nx.find_cycle(self.edges))
            raise ValueError(f"dataflow graph: {cycle} wait for each other; remove one of their inputs")

    @cached_property
    def mfcs(self) -> tuple[MFC, ...]:
        """The calls on models, as they were listed."""
        return tuple(call for call in self.calls if isinstance(call, MFC))

    @cached_property
    def producers(self) -> dict[str, str]:
        """The call that writes each key."""
        return {key: call.name for call in self.calls for key in call.outputs}

    @cached_property
    def edges(self) -> nx.DiGraph:
        """The graph over call names; each edge has the keys that travel along it."""
        graph = nx.DiGraph()
        graph.add_nodes_from(call.name for call in self.calls)
        for call in self.calls:
            for key in call.inputs:
                if key in self.producers:
                    source = self.producers[key]
                    keys = graph.get_edge_data(source, call.name, {"keys": ()})["keys"]
                    graph.add_edge(source, call.name, keys=(*keys, key))
        return graph

    @cached_property
    def order(self) -> tuple[MFC | HostCall, ...]:
        """The calls in an order in which every input exists; ties as they were listed."""
        rank = {call.name: i for i, call in enumerate(self.calls)}
        by_name = {call.name: call for call in self.calls}
        return tuple(by_name[name] for name in nx.lexicographical_topological_sort(self.edges, key=rank.__getitem__))

    @property
    def roles(self) -> tuple[str, ...]:
        """Role names in the order of their first call."""
        return tuple(dict.fromkeys(mfc.role for mfc in self.mfcs))

    def num_updates(self, role: str) -> int:
        """Returns the updates that a step makes to a trained role."""
        call = self.train_call(role)
        minibatches = call.minibatches if call else None
        return minibatches.count * minibatches.passes if minibatches else 1

    def train_call(self, role: str) -> MFC | None:
        """Returns the call that trains `role`, None for a role that is never trained."""
        return next((mfc for mfc in self.mfcs if mfc.role == role and mfc.call == "train_step"), None)


def _refuse_repeats(what: str, names: Sequence[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"dataflow graph: {what} {', '.join(repeated)} appears twice; each may appear once")
