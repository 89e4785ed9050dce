"""What the sources say of themselves: files, imports and names, read without importing anything."""

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import networkx as nx

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Import:
    """`realjax.<target>` imported at `place` (file:line)."""

    place: str
    target: str

    @property
    def package(self) -> str:
        return self.target.split(".")[0]


def list_packages() -> list[str]:
    """Returns the folders of realjax."""
    return sorted(path.parent.name for path in (ROOT / "realjax").glob("*/__init__.py"))


def list_files(package: str) -> list[Path]:
    """Returns the Python files of a folder of realjax."""
    return sorted((ROOT / "realjax" / package).rglob("*.py"))


def find_imports(path: Path) -> Iterator[Import]:
    """Yields every import of realjax in a file, also those inside functions."""
    place = path.relative_to(ROOT)
    for node in ast.walk(_parse(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == "realjax":
            names = [f"realjax.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        elif isinstance(node, ast.ImportFrom):
            names = [f"realjax.<relative, level {node.level}>"]
        else:
            continue
        yield from (
            Import(place=f"{place}:{node.lineno}", target=name.removeprefix("realjax."))
            for name in names
            if name.startswith("realjax.")
        )


def read_import_graph() -> nx.DiGraph:
    """Returns the folders of realjax, an edge u -> v where a file of u imports v."""
    graph = nx.DiGraph()
    for package in list_packages():
        targets = {item.package for path in list_files(package) for item in find_imports(path)}
        graph.add_edges_from((package, target) for target in targets - {package})
    return graph


def resolves(name: str) -> bool:
    """Returns whether there is such a module, or `module:name`, where a name may be `Class.method`."""
    module, _, inner = name.partition(":")
    path = find_module(module)
    return path is not None and (not inner or (path.is_file() and defines(path, inner)))


def find_module(module: str) -> Path | None:
    """Returns the file or the folder of a module such as `realjax.core.axes`; None where there is none."""
    path = ROOT.joinpath(*module.split("."))
    return next((place for place in (path.with_suffix(".py"), path) if place.exists()), None)


def defines(path: Path, name: str) -> bool:
    """Returns whether a file defines `name` at its top level; `Class.method` is a method or field of a class there."""
    body: Sequence[ast.stmt] = _parse(path).body
    for part in name.split("."):
        found = [node for node in body if part in _list_names(node)]
        if not found:
            return False
        body = found[-1].body if isinstance(found[-1], ast.ClassDef) else []
    return True


def _list_names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))
