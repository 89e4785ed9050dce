"""What a cluster can do: its devices, their memory and rates, and the links between them."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from realjax.allocation.measured import (
    CollectivePoint,
    HeadPoint,
    LayerPoint,
    Measured,
    MovePoint,
    ProductPoint,
    RoundPoint,
    SyncPoint,
    UpdatePoint,
)

FOLDER = Path(__file__).parent / "clusters"
LINKS = ("within_node", "between_nodes", "to_host")
TABLES = {
    "products": ProductPoint,
    "collectives": CollectivePoint,
    "layers": LayerPoint,
    "heads": HeadPoint,
    "updates": UpdatePoint,
    "syncs": SyncPoint,
    "rounds": RoundPoint,
    "moves": MovePoint,
}


@dataclass(frozen=True, kw_only=True)
class Link:
    """What connects two memories: alpha-beta, as in Hockney's model: seconds = latency + bytes / bandwidth."""

    bandwidth: float  # bytes a second, of one device in one direction
    latency: float  # seconds of the smallest message

    def seconds(self, num_bytes: float) -> float:
        """Returns how long a message takes."""
        return self.latency + num_bytes / self.bandwidth


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes of equal devices. Rates are the data sheet's peaks; `factors` say which share of them programs reach."""

    name: str
    num_nodes: int
    devices_per_node: int
    memory_bytes: int  # of a device
    matmul_flops: Mapping[str, float]  # dense, by dtype: operations a second
    memory_bandwidth: float  # bytes a second of a device's own memory
    within_node: Link
    between_nodes: Link
    to_host: Link
    host_memory_bytes: int | None = None  # of a node; None: not limited
    dispatch_seconds: float = 0.0  # to start a program
    factors: Mapping[str, float] = field(default_factory=dict)  # by term of the cost model; measured runs refine them
    measured: Measured = Measured()
    source: str = ""  # of the figures
    platform: str = "gpu"  # as JAX names it: which precision runs have by default
    overlaps: bool = True  # programs on different devices run at once

    def __hash__(self) -> int:
        """By name and size alone, so that functions of a cluster can be cached."""
        return hash((self.name, self.num_nodes, self.devices_per_node))

    @property
    def num_devices(self) -> int:
        return self.num_nodes * self.devices_per_node

    def factor(self, name: str, default: float = 1.0) -> float:
        """Returns a calibrated factor."""
        return self.factors.get(name, default)

    def resize(self, num_devices: int) -> "Cluster":
        """Returns the cluster with so many devices, in whole nodes or a part of one. Raises ValueError for others."""
        per_node = min(num_devices, self.devices_per_node)
        if num_devices < 1 or num_devices % per_node:
            raise ValueError(
                f"cluster {self.name}: {num_devices} devices, in nodes of {self.devices_per_node}; use a number from 1 "
                f"to {self.devices_per_node}, or a multiple of {self.devices_per_node}"
            )
        return replace(self, num_nodes=num_devices // per_node, devices_per_node=per_node)

    def to_json(self) -> str:
        """Returns the text of a cluster.json."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str, subject: str = "cluster.json") -> "Cluster":
        """Returns the cluster that `to_json` wrote. Raises ValueError, with `subject` in front, for any other text."""
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{subject}: not JSON ({error}); write it as `realjax profile` does") from None
        return _read(found, subject)


def find_cluster(text: str) -> Cluster:
    """Returns the cluster of a name such as h100 or h100x128 (devices in all), or of the path of a cluster.json.

    A name alone is one node. Raises ValueError for unknown names, sizes that are not whole nodes and files that lack
    something.
    """
    if text.endswith(".json"):
        path = Path(text)
        if not path.is_file():
            raise ValueError(
                f"cluster: there is no file {text}; `realjax profile` writes one, or use {', '.join(list_names())}"
            )
        return Cluster.from_json(path.read_text(), subject=text)
    match = re.fullmatch(r"([a-z][a-z0-9_-]*?)(?:x(\d+))?", text.strip().lower())
    path = FOLDER / f"{match[1]}.json" if match else None
    if not match or path is None or not path.is_file():
        raise ValueError(
            f"cluster: '{text}' is not known; use {', '.join(list_names())} with the number of devices, "
            "as h100x16, or the path of a cluster.json"
        )
    one_node = Cluster.from_json(path.read_text(), subject=path.name)
    return replace(one_node.resize(int(match[2])), name=match[0]) if match[2] else one_node


def list_names() -> list[str]:
    """Returns the names of the kinds of accelerator that are known."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def _read(found: Any, subject: str) -> Cluster:
    if not isinstance(found, dict):
        raise ValueError(
            f"{subject}: a {type(found).__name__}, but a cluster is an object with keys; see {', '.join(list_names())}"
        )
    known = {each.name for each in fields(Cluster)}
    if unknown := sorted(found.keys() - known):
        raise ValueError(f"{subject}: unknown {', '.join(unknown)}; a cluster has {', '.join(sorted(known))}")
    needed = ["name", "num_nodes", "devices_per_node", "memory_bytes", "matmul_flops", "memory_bandwidth"]
    needed += ["within_node", "to_host"]
    # A single node has no link to others.
    if found.get("num_nodes") == 1:
        found = {"between_nodes": found.get("within_node"), **found}
    if missing := [name for name in [*needed, "between_nodes"] if found.get(name) is None]:
        links = '; a link is {"bandwidth": bytes a second, "latency": seconds}' if missing[-1] in LINKS else ""
        raise ValueError(
            f"{subject}: {', '.join(missing)} missing; add it, or measure it with `realjax profile`{links}"
        )
    for name in ("num_nodes", "devices_per_node", "memory_bytes"):
        if not isinstance(found[name], int) or found[name] < 1:
            raise ValueError(f"{subject}: {name} is {found[name]}; it must be a whole number of at least 1")
    for name, rate in {"memory_bandwidth": found["memory_bandwidth"], **_rates(found["matmul_flops"], subject)}.items():
        _check_positive(rate, f"{subject}: {name}")
    links = {name: _read_link(found[name], f"{subject}: {name}") for name in LINKS}
    return Cluster(**{**found, **links, "measured": _read_tables(found.get("measured", {}), subject)})


def _rates(found: Any, subject: str) -> dict[str, float]:
    if not isinstance(found, dict) or not found:
        raise ValueError(f'{subject}: matmul_flops is {found}; it must have a rate by dtype, as {{"bfloat16": 1e12}}')
    return {f"matmul_flops of {dtype}": rate for dtype, rate in found.items()}


def _check_positive(rate: Any, subject: str) -> None:
    if not isinstance(rate, int | float) or rate <= 0:
        raise ValueError(f"{subject} is {rate}; it must be a number above 0")


def _read_link(found: Any, subject: str) -> Link:
    if not isinstance(found, dict) or found.keys() != {"bandwidth", "latency"}:
        raise ValueError(f"{subject} is {found}; a link has a bandwidth (bytes a second) and a latency (seconds)")
    _check_positive(found["bandwidth"], f"{subject}: bandwidth")
    if not isinstance(found["latency"], int | float) or found["latency"] < 0:
        raise ValueError(f"{subject}: latency is {found['latency']}; it must be seconds, 0 or more")
    return Link(**found)


def _read_tables(found: Any, subject: str) -> Measured:
    if not isinstance(found, dict) or not found.keys() <= TABLES.keys():
        raise ValueError(f"{subject}: measured has the tables {', '.join(TABLES)}, found {list(found)}")
    tables = {}
    for name, point in TABLES.items():
        keys = {each.name for each in fields(point)}
        rows = found.get(name, ())
        if wrong := [row for row in rows if not isinstance(row, dict) or row.keys() != keys]:
            raise ValueError(
                f"{subject}: a row of measured.{name} is {wrong[0]}; it must have {', '.join(sorted(keys))}"
            )
        tables[name] = tuple(point(**row) for row in rows)
    return Measured(**tables)
