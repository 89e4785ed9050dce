"""A graph as a picture and as text."""

from pathlib import Path

import networkx as nx

from realjax.dataflow.graph import Call, DataflowGraph, Generate, Host, Inference, Train

KINDS = {Generate: "generate", Inference: "inference", Train: "train_step", Host: "host"}
COLORS = {Generate: "#dbeafe", Inference: "#dcfce7", Train: "#ffedd5", Host: "#f1f5f9"}


def describe_graph(graph: DataflowGraph) -> str:
    """Returns a line per call: its role, what it reads and what it writes."""
    lines = []
    for call in graph.order:
        sources: dict[str, list[str]] = {}
        for key in call.inputs:
            sources.setdefault(_source(graph, call, key), []).append(key)
        reads = "; ".join(f"{', '.join(keys)} from {source}" for source, keys in sources.items())
        writes = ", ".join(call.outputs) or "metrics"
        lines.append(f"{call.name} ({KINDS[type(call)]} on {_place(call)}): {reads} -> {writes}")
    return "\n".join(lines)


def _source(graph: DataflowGraph, call: Call, key: str) -> str:
    return graph.producers.get(key, "dataset") + (" of the step before" if key in call.delays else "")


def _place(call: Call) -> str:
    return "the host" if isinstance(call, Host) else call.role


def draw_graph(graph: DataflowGraph, path: Path) -> None:
    """Draws calls from left to right, in the order they can run, and the keys on their edges."""
    columns = list(nx.topological_generations(graph.edges))
    places = {
        name: (x, (len(column) - 1) / 2 - y)
        for x, column in enumerate(columns)
        for y, name in enumerate(sorted(column))
    }
    # Imported here: it takes a second, which nobody should wait for before the first step.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(columns), 1 + 1.4 * max(map(len, columns))))
    axes = figure.subplots()
    calls = {call.name: call for call in graph.calls}
    for name, (x, y) in places.items():
        box = {"boxstyle": "round,pad=0.5", "facecolor": COLORS[type(calls[name])], "edgecolor": "#475569"}
        axes.text(x, y, f"{name}\n{_place(calls[name])}", ha="center", va="center", bbox=box, zorder=2)
    for source, target, data in graph.edges.edges(data=True):
        (x0, y0), (x1, y1) = places[source], places[target]
        arrow = {"arrowstyle": "->", "color": "#475569", "shrinkA": 40, "shrinkB": 40}
        axes.annotate("", (x1, y1), (x0, y0), arrowprops=arrow, zorder=1)
        axes.text((x0 + x1) / 2, (y0 + y1) / 2 + 0.12, "\n".join(data["keys"]), ha="center", fontsize=8)
    axes.set_xlim(-0.7, len(columns) - 0.3)
    axes.set_ylim(min(y for _, y in places.values()) - 0.8, max(y for _, y in places.values()) + 0.8)
    axes.axis("off")
    figure.savefig(path, dpi=120, bbox_inches="tight")
