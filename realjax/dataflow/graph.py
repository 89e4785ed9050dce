"""Model function calls (MFCs) and the graph that follows from the keys they read and write."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import networkx as nx

from realjax.core.loss import Loss

Call = Literal["generate", "inference", "train_step"]


@dataclass(frozen=True, kw_only=True)
class MFC:
    """One call on one role: it reads `inputs` of the batch and adds `outputs` to it."""

    name: str
    role: str
    call: Call
    inputs: tuple[str, ...]
    outputs: tuple[str, ...] = ()
    loss: Loss | None = None  # train_step: what is minimised
    head: str | None = None  # inference: which output of the model, see `core.loss.Loss`
    num_mbs: int | None = None  # micro-batches; None: one, or as many as `max_tokens_per_mb` asks for
    max_tokens_per_mb: int | None = None
    max_seqlen: int | None = None  # longest sequence the call can meet; attention then looks no further back


@dataclass(frozen=True)
class DataflowGraph:
    """The calls of one step. An edge u -> v exists for every key that u writes and v reads.

    Keys that no call writes come from the dataset (`dataset_keys`). Raises ValueError for a name or key made twice,
    a key that nobody makes, a cycle, or two training calls of one role.
    """

    mfcs: tuple[MFC, ...]
    dataset_keys: frozenset[str]

    def __post_init__(self) -> None:
        _refuse_repeats("call name", [mfc.name for mfc in self.mfcs])
        _refuse_repeats("key", [*(key for mfc in self.mfcs for key in mfc.outputs), *self.dataset_keys])
        _refuse_repeats("training call of role", [mfc.role for mfc in self.mfcs if mfc.call == "train_step"])
        for mfc in self.mfcs:
            if orphans := set(mfc.inputs) - set(self.producers) - self.dataset_keys:
                raise ValueError(
                    f"dataflow graph: call '{mfc.name}' reads {sorted(orphans)}, which no call writes and the "
                    f"dataset does "
                    f"not hold (it holds {sorted(self.dataset_keys)}); add a call with that output, or the dataset key"
                )
        if not nx.is_directed_acyclic_graph(self.edges):
            cycle = " -> ".join(u for u, _ in nx.find_cycle(self.edges))
            raise ValueError(f"dataflow graph: {cycle} wait for each other; remove one of their inputs")

    @cached_property
    def producers(self) -> dict[str, str]:
        """The call that writes each key."""
        return {key: mfc.name for mfc in self.mfcs for key in mfc.outputs}

    @cached_property
    def edges(self) -> nx.DiGraph:
        """The graph over call names; each edge has the keys that travel along it."""
        graph = nx.DiGraph()
        graph.add_nodes_from(mfc.name for mfc in self.mfcs)
        for mfc in self.mfcs:
            for key in mfc.inputs:
                if key in self.producers:
                    source = self.producers[key]
                    keys = graph.get_edge_data(source, mfc.name, {"keys": ()})["keys"]
                    graph.add_edge(source, mfc.name, keys=(*keys, key))
        return graph

    @cached_property
    def order(self) -> tuple[MFC, ...]:
        """The calls in an order in which every input exists; ties as they were listed."""
        rank = {mfc.name: i for i, mfc in enumerate(self.mfcs)}
        by_name = {mfc.name: mfc for mfc in self.mfcs}
        return tuple(by_name[name] for name in nx.lexicographical_topological_sort(self.edges, key=rank.__getitem__))

    @property
    def roles(self) -> tuple[str, ...]:
        """Role names in the order of their first call."""
        return tuple(dict.fromkeys(mfc.role for mfc in self.mfcs))

    def train_call(self, role: str) -> MFC | None:
        """Returns the call that trains `role`, None for a role that is never trained."""
        return next((mfc for mfc in self.mfcs if mfc.role == role and mfc.call == "train_step"), None)


def _refuse_repeats(what: str, names: Sequence[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"dataflow graph: {what} {', '.join(repeated)} appears twice; each may appear once")
