"""Draws docs/architecture.svg from the code: `python -m tools.draw_house`.

Folders are boxes, an arrow is an import that really exists, and two coloured lines are the path of a batch and that of
a parameter. The picture carries its data, so that a test can tell when it no longer shows the code of today.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict
from xml.etree import ElementTree

import matplotlib
import networkx as nx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from tools import sources

PICTURE = sources.ROOT / "docs" / "architecture.svg"
DESCRIPTION = "{http://purl.org/dc/elements/1.1/}description"
WIDTH, HEIGHT, ROW = 1.62, 0.8, 1.5  # of a box; from row to row
Place = tuple[float, float]


@dataclass(frozen=True)
class Stop:
    """A function on a path, and what leaves it."""

    name: str  # module:function
    words: str

    @property
    def folder(self) -> str:
        return self.name.split(".")[1]


@dataclass(frozen=True, kw_only=True)
class Route:
    """What travels, its stops in order, and how its line looks."""

    title: str
    color: str
    edge: float  # the edge of a box at which its numbers stand: 1 the upper one, -1 the lower one
    stops: tuple[Stop, ...]


BATCH = Route(
    title="a batch of PPO",
    color="#1d4ed8",
    edge=1,
    stops=(
        Stop("realjax.data.loader:Loader.batch", "prompts"),
        Stop("realjax.engine.batching:generate", "answers"),
        Stop("realjax.runtime.rollouts:pack_rollout", "tokens, logprobs in rows"),
        Stop("realjax.engine.inference:make_inference", "ref_logprobs, values, scores"),
        Stop("realjax.rewards.mix:mix_rewards", "rewards"),
        Stop("realjax.algorithms.ppo:make_advantages", "advantages, train_mask"),
        Stop("realjax.engine.train:make_train_step", "metrics"),
        Stop("realjax.record.metrics:MetricsWriter.write", "metrics.jsonl, curves"),
    ),
)
PARAMETER = Route(
    title="a parameter",
    color="#c2410c",
    edge=-1,
    stops=(
        Stop("realjax.hf.load:load_params", "a leaf on its home layout"),
        Stop("realjax.runtime.roles:load_role", "the role's state"),
        Stop("realjax.reshard.apply:reshard", "a copy in the call's layout"),
        Stop("realjax.engine.compiled:Compiled.__call__", "used, or updated"),
        Stop("realjax.runtime.checkpoint:RunCheckpointer.save", "Orbax, to go on from"),
        Stop("realjax.hf.save:save_hf", "safetensors"),
    ),
)
ROUTES = (BATCH, PARAMETER)


class Size(TypedDict):
    """What a folder holds."""

    files: int
    lines: int


class House(TypedDict):
    """What the picture shows."""

    folders: dict[str, Size]
    imports: list[list[str]]  # those that do not follow from others
    paths: dict[str, list[str]]


def read_house() -> House:
    """Returns what a picture of the code shows now. Raises ValueError for a stop that is no function of it."""
    for stop in itertools.chain.from_iterable(route.stops for route in ROUTES):
        if not sources.resolves(stop.name):
            raise ValueError(f"tools/draw_house.py: a path goes through {stop.name}, which is not there; name its stop")
    sizes: dict[str, Size] = {}
    for package in sources.list_packages():
        files = [path for path in sources.list_files(package) if path.name != "__init__.py"]
        lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
        sizes[package] = Size(files=len(files), lines=lines)
    edges = nx.transitive_reduction(sources.read_import_graph()).edges
    return House(
        folders=sizes,
        imports=sorted([source, target] for source, target in edges),
        paths={route.title: [stop.name for stop in route.stops] for route in ROUTES},
    )


def read_picture(picture: Path = PICTURE) -> House:
    """Returns what a drawn picture shows."""
    text = ElementTree.parse(picture).getroot().findtext(f".//{DESCRIPTION}")
    if text is None:
        raise ValueError(f"'{picture}' carries no data; draw it again with python -m tools.draw_house")
    return json.loads(text)


def find_places(house: House) -> dict[str, Place]:
    """Returns where each folder stands: below all that import it, and near what it is connected with."""
    rows = [sorted(row) for row in nx.topological_generations(nx.DiGraph([(u, v) for u, v in house["imports"]]))]
    for i in [*range(len(rows))] * 4:
        tries = ([*rows[:i], list(row), *rows[i + 1 :]] for row in itertools.permutations(rows[i]))
        rows = min(tries, key=lambda rows: _measure(house, _spread(rows)))
    return _spread(rows)


def _spread(rows: Sequence[Sequence[str]]) -> dict[str, Place]:
    most = max(map(len, rows))
    return {
        name: ((k - (len(row) - 1) / 2) * WIDTH * (1.22 + 0.14 * (most - len(row))), -i * ROW)
        for i, row in enumerate(rows)
        for k, name in enumerate(row)
    }


def _measure(house: House, places: Mapping[str, Place]) -> float:
    """Returns how far arrows and lines go sideways: short ones cross little."""
    steps = [pair for route in ROUTES for pair in itertools.pairwise(stop.folder for stop in route.stops)]
    return sum(abs(places[a][0] - places[b][0]) for a, b in (*map(tuple, house["imports"]), *steps))


def draw(house: House, path: Path) -> None:
    """Draws the picture; its data go into the file."""
    places = find_places(house)
    figure = Figure(figsize=(11, 9.6))
    axes = figure.add_axes((0, 0, 1, 1))
    for source, target in house["imports"]:
        (x0, y0), (x1, y1) = places[source], places[target]
        start, end = (x0, y0 - HEIGHT / 2), (x1, y1 + HEIGHT / 2)
        axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color="#a8b3c2", zorder=1))
    for name, (x, y) in places.items():
        _draw_box(axes, name, house["folders"][name], x, y)
    for route in ROUTES:
        _draw_route(axes, route, places)
    xs, ys = zip(*places.values())
    _draw_legend(axes, min(xs) - WIDTH / 2, min(ys) - HEIGHT)
    axes.set_xlim(min(xs) - WIDTH * 0.6, max(xs) + WIDTH * 0.6)
    axes.set_ylim(min(ys) - 3.0, max(ys) + HEIGHT)
    axes.axis("off")
    with matplotlib.rc_context({"svg.hashsalt": "house", "svg.fonttype": "none"}):
        data = {"Date": None, "Description": json.dumps(house)} if path.suffix == ".svg" else {}
        figure.savefig(path, metadata=data, dpi=100)


def _draw_box(axes: Axes, name: str, size: Size, x: float, y: float) -> None:
    corner = (x - WIDTH / 2, y - HEIGHT / 2)
    box = FancyBboxPatch(corner, WIDTH, HEIGHT, boxstyle="round,pad=0,rounding_size=0.08")
    # Lines that pass behind a box can be followed.
    box.set(facecolor="#f8fafc", edgecolor="#475569", alpha=0.82, zorder=2)
    axes.add_patch(box)
    axes.text(x, y + 0.08, name, ha="center", va="center", fontsize=13, fontweight="bold", zorder=5)
    text = f"{size['files']} files, {size['lines']:,} lines"
    axes.text(x, y - 0.16, text, ha="center", va="center", fontsize=8.5, color="#475569", zorder=5)


def _draw_route(axes: Axes, route: Route, places: Mapping[str, Place]) -> None:
    """Draws a route's numbers along an edge of its boxes, and a line from each to the next."""
    folders, spots = [stop.folder for stop in route.stops], list[Place]()
    for i, folder in enumerate(folders):
        x, y = places[folder]
        turn, turns = folders[:i].count(folder), folders.count(folder)
        spots.append((x + (turn - (turns - 1) / 2) * 0.42, y + route.edge * HEIGHT / 2))
    for start, end in itertools.pairwise(spots):
        bend = FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, shrinkA=8, shrinkB=8)
        bend.set(connectionstyle=f"arc3,rad={0.18 * route.edge}", color=route.color, linewidth=2, zorder=1.5)
        axes.add_patch(bend)
    for number, (x, y) in enumerate(spots, start=1):
        _draw_number(axes, number, x, y, route.color)


def _draw_number(axes: Axes, number: int, x: float, y: float, color: str) -> None:
    axes.plot([x], [y], "o", markersize=15, color=color, markeredgecolor="white", zorder=6)
    axes.text(x, y - 0.01, str(number), ha="center", va="center", fontsize=9, color="white", zorder=7)


def _draw_legend(axes: Axes, x: float, y: float) -> None:
    for column, route in enumerate(ROUTES):
        left = x + column * 5.6
        axes.text(left, y, f"The path of {route.title}", fontsize=11, fontweight="bold", color=route.color)
        for number, stop in enumerate(route.stops, start=1):
            height = y - 0.22 * number
            name = stop.name.removeprefix("realjax.")
            axes.text(left, height, f"{number}  {name}: {stop.words}", fontsize=9)


if __name__ == "__main__":
    draw(read_house(), PICTURE)
