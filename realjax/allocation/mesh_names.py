"""Names of device meshes, as ReaL writes them: `NODE01:0,1,2,3`, `NODE01`, `NODE[01-02]`, `NODE[01,03-04],COM08`."""

import re
from collections.abc import Sequence

# A comma inside brackets separates numbers, one outside them names.
_NAMES = re.compile(r"[^,:\s\[\]]+(?:\[[^\[\]]*\])?")
_RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")
MOST_NODES = 65_536


def expand_nodes(text: str, subject: str) -> list[str]:
    """Returns the node names that a list such as `NODE[01,03-04],COM08` stands for.

    Raises ValueError, naming `subject`, for text that is no such list or names a node twice.
    """
    parts = _NAMES.findall(text)
    if not parts or ",".join(parts) != text:
        raise ValueError(f"{subject}: found {text!r}; it needs node names such as NODE01,NODE02 or NODE[01-02]")
    names = [name for part in parts for name in _expand(part, subject)]
    if len(set(names)) != len(names):
        raise ValueError(f"{subject}: {text!r} names a node twice")
    return names


def _expand(part: str, subject: str) -> list[str]:
    if "[" not in part:
        return [part]
    prefix, _, inside = part.rstrip("]").partition("[")
    names = []
    for item in inside.split(","):
        match = _RANGE.fullmatch(item)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"{subject}: {part!r} has no numbers or ranges in its brackets; write NODE[01,03-04]")
        if int(match[2] or match[1]) - int(match[1]) >= MOST_NODES:
            raise ValueError(f"{subject}: {part!r} names more than {MOST_NODES} nodes; write those of the run")
        width = len(match[1])
        names += [f"{prefix}{i:0{width}d}" for i in range(int(match[1]), int(match[2] or match[1]) + 1)]
    return names


def default_nodes(num_nodes: int) -> list[str]:
    """Returns NODE01, NODE02, ...: the names of a run's nodes when it gives none."""
    return [f"NODE{i:02d}" for i in range(1, num_nodes + 1)]


def parse_device_mesh(text: str, *, nodes: Sequence[str], num_devices_per_node: int, subject: str) -> tuple[int, ...]:
    """Returns the numbers, in the run's device list, of the devices that a mesh name stands for.

    `<nodes>` are whole nodes; `<node>:<ids>` is a part of one. Raises ValueError, naming `subject`, for an unknown
    node, a device beyond the node's or one given twice.
    """
    names, colon, ids = text.partition(":")
    chosen = expand_nodes(names, subject)
    if unknown := [name for name in chosen if name not in nodes]:
        raise ValueError(f"{subject}: no node {', '.join(unknown)} in this run; its nodes are {', '.join(nodes)}")
    firsts = [nodes.index(name) * num_devices_per_node for name in chosen]
    if not colon:
        return tuple(first + i for first in firsts for i in range(num_devices_per_node))
    if len(chosen) != 1 or not re.fullmatch(r"\d{1,9}(,\d{1,9})*", ids):
        raise ValueError(f"{subject}: found {text!r}; a part of a node is written NODE01:0,1,2,3, and only of one node")
    numbers = [int(i) for i in ids.split(",")]
    if max(numbers) >= num_devices_per_node or len(set(numbers)) != len(numbers):
        raise ValueError(
            f"{subject}: {text!r} needs different device numbers below n_gpus_per_node={num_devices_per_node}"
        )
    return tuple(firsts[0] + i for i in numbers)
