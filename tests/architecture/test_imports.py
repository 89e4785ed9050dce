"""Imports go down only; the table below says what each package may know."""

import networkx as nx
import pytest

from tools.sources import ROOT, Import, find_imports, list_files, list_packages, read_import_graph

# `package.module` allows that module of a package and nothing else of it.
ALLOWED: dict[str, frozenset[str]] = {
    "core": frozenset(),
    "models": frozenset({"core"}),
    "algorithms": frozenset({"core"}),
    "rewards": frozenset({"core"}),
    "environments": frozenset({"core"}),
    "data": frozenset({"core"}),
    "dataflow": frozenset({"core", "data", "environments", "models.config"}),
    "reshard": frozenset({"core"}),
    "launch": frozenset({"core"}),
    "engine": frozenset({"core", "models"}),
    "hf": frozenset({"core", "models"}),
    "allocation": frozenset({"core", "data", "dataflow", "models.config"}),
    "options": frozenset({"core", "algorithms", "rewards", "environments", "dataflow"}),
    # No allocation: a graph is made before anybody knows where it runs.
    "experiments": frozenset(
        {"core", "options", "dataflow", "algorithms", "rewards", "environments", "data", "hf", "models.config"}
    ),
    # No options and no experiments: the runtime carries out any run that is described to it. The models are for
    # building a role before its engine.
    "record": frozenset({"core", "data", "dataflow"}),
    "runtime": frozenset(
        {"core", "models", "engine", "hf", "reshard", "allocation", "dataflow", "data", "environments", "record"}
    ),
    # Measures what runs are made of: no run, no runtime.
    "profiling": frozenset({"core", "models", "engine", "reshard", "allocation.cluster", "allocation.measured"}),
    # What is compiled is what the runtime would run.
    "aot": frozenset({"core", "models", "engine", "allocation", "dataflow", "data", "runtime"}),
    "apps": frozenset(
        {"core", "models", "algorithms", "data", "dataflow", "reshard", "engine", "hf", "allocation", "options"}
        | {"experiments", "rewards", "record", "runtime", "launch", "profiling"}
    ),
}


def violations(package: str, found: list[Import]) -> list[str]:
    """Returns a line for each import that the package may not make."""
    allowed = ALLOWED[package] | {package}
    may = f"'{package}' may import {', '.join(sorted(ALLOWED[package])) or 'nothing of realjax'}"
    return [
        f"{item.place} imports realjax.{item.target}: {may}"
        for item in found
        if not any(f"{item.target}.".startswith(f"{name}.") for name in allowed)
    ]


def test_every_package_stands_in_the_table():
    assert set(list_packages()) == set(ALLOWED)


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_go_down(package):
    found = [item for path in list_files(package) for item in find_imports(path)]
    assert not (wrong := violations(package, found)), "\n".join(wrong)


def test_the_top_module_imports_no_package():
    """`import realjax` stays free of cost, and of cycles."""
    assert not list(find_imports(ROOT / "realjax" / "__init__.py"))


def test_packages_have_no_cycle():
    graph = read_import_graph()
    assert nx.is_directed_acyclic_graph(graph), nx.find_cycle(graph)


def test_no_module_is_named_utils():
    parts = ("realjax", "configs", "launch", "tools", "tests")
    assert not [path for part in parts for path in (ROOT / part).rglob("*util*.py")]


def test_a_violation_is_told_with_its_place():
    """The check itself: one wrong import among right ones is found, and said where."""
    items = [
        Import(place="realjax/data/x.py:1", target="core.batch"),
        Import(place="realjax/data/x.py:12", target="engine.train"),
    ]
    assert violations("data", items) == [
        "realjax/data/x.py:12 imports realjax.engine.train: 'data' may import core",
    ]
    config = Import(place="realjax/allocation/x.py:1", target="models.config")
    build = Import(place="realjax/allocation/x.py:2", target="models.build")
    assert len(violations("allocation", [config, build])) == 1
