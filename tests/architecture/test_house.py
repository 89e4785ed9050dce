"""The parts of the house style that a machine can check."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from realjax.core.layout import MESH_AXES

ROOT = Path(__file__).resolve().parents[2]
MOST_FILE_LINES, MOST_FUNCTION_LINES, MOST_PARAMETERS = 400, 60, 7
MOST_ANY = 8  # in 1,000 lines of the package
SOURCES = sorted(
    path for part in ("realjax", "configs", "launch", "tools", "tests") for path in (ROOT / part).rglob("*.py")
)
PACKAGE = [path for path in SOURCES if path.is_relative_to(ROOT / "realjax")]
# Tables that place arrays, the meshes themselves, and what is run on parts of them by hand.
NAME_MESH_AXES = {"realjax/core/axes.py", "realjax/core/layout.py", "realjax/engine/manual_axes.py"}
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
# Written so that this file does not match itself.
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:tmp|work|root|home/\w+|Users/\w+)/" + r"[\w.]")


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def place(path: Path, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.ExceptHandler) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def ask_git(*words: str) -> list[str]:
    """Returns the lines that git answers; skips where the sources came without git."""
    try:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")


def tracked_files() -> list[Path]:
    """Returns what git tracks or would add."""
    names = ask_git("ls-files", "--cached", "--others", "--exclude-standard")
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def test_no_environment_is_tracked():
    """Nor a link to one, which git has as a file of the link's name, nor what installing or running leaves."""
    is_made = re.compile(
        r"(^|/)(\.?v?env(-\w+)?|site-packages|node_modules|__pycache__|[\w.]+\.egg-info|pyvenv\.cfg)(/|$)"
    )
    assert is_made.search(".venv") and is_made.search("a/venv/bin/x") and not is_made.search("tests/environments/x.py")
    tracked = [line.split(maxsplit=3) for line in ask_git("ls-files", "--stage")]
    assert not [name for mode, _, _, name in tracked if mode == "120000" or is_made.search(name)]


def test_files_are_short():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert not {name: length for name, length in lengths.items() if length > MOST_FILE_LINES}


def test_functions_are_short():
    too_long = {}
    for path in SOURCES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, FUNCTIONS) and (node.end_lineno or 0) - node.lineno + 1 > MOST_FUNCTION_LINES:
                too_long[f"{place(path, node)} {node.name}"] = (node.end_lineno or 0) - node.lineno + 1
    assert not too_long


def test_types_are_named():
    """`Any` is for what has no type that could be written, and counts wherever it stands, in an alias too."""
    found = {}
    for path in PACKAGE:
        names = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Name | ast.Attribute)]
        found[path] = sum((node.id if isinstance(node, ast.Name) else node.attr) == "Any" for node in names)
    num_lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE)
    most = {str(path.relative_to(ROOT)): count for path, count in found.items() if count > 4}
    assert sum(found.values()) <= MOST_ANY * num_lines / 1000, most


def list_parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Returns the names of what a caller gives: all but `self` and `cls`."""
    every = [*node.args.posonlyargs, *node.args.args, node.args.vararg, *node.args.kwonlyargs, node.args.kwarg]
    return [one.arg for one in every if one is not None and one.arg not in ("self", "cls")]


def test_functions_take_few_parameters():
    """What belongs together is one value: a dataclass with a meaning of its own."""
    found = {}
    for path in SOURCES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, FUNCTIONS) and len(names := list_parameters(node)) > MOST_PARAMETERS:
                found[f"{place(path, node)} {node.name}"] = names
    assert not {name: names for name, names in found.items() if not name.startswith("tests/")}


def test_functions_are_named_by_verbs():
    """`mean_of(values)` names a value, as `of` at the end of a name always does; `X.of(...)` makes an X."""
    walked = [(path, node) for path in PACKAGE for node in ast.walk(tree_of(path))]
    named = [f"{place(path, node)} {node.name}" for path, node in walked if isinstance(node, FUNCTIONS)]
    assert not [name for name in named if name.endswith("_of")]


def test_no_exception_is_swallowed():
    """A handler of everything must do something, and none may be bare."""
    found = []
    for path in SOURCES:
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            catches_all = isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
            if node.type is None or (catches_all and all(isinstance(part, ast.Pass) for part in node.body)):
                found.append(place(path, node))
    assert not found


def says_it_all(method: ast.FunctionDef | ast.AsyncFunctionDef, owner: ast.ClassDef) -> bool:
    """Returns whether a method's name and types suffice: a property, what a base class documents, or two statements."""
    return bool(owner.bases or method.decorator_list) or len(method.body) <= 2


def public_without_docstring(path: Path) -> Iterator[str]:
    """Yields the public classes, functions and methods that say nothing; those inside functions are not looked at."""

    def look(body: list[ast.stmt], owner: ast.ClassDef | None) -> Iterator[str]:
        for node in body:
            if not isinstance(node, FUNCTIONS | ast.ClassDef) or node.name.startswith("_"):
                continue
            is_exempt = isinstance(node, FUNCTIONS) and owner is not None and says_it_all(node, owner)
            if ast.get_docstring(node) is None and not is_exempt:
                yield f"{place(path, node)} {node.name}"
            if isinstance(node, ast.ClassDef):
                yield from look(node.body, node)

    yield from look(tree_of(path).body, None)


def test_everything_public_has_a_docstring():
    silent = [found for path in PACKAGE for found in public_without_docstring(path)]
    assert not silent, "\n".join(silent)


def test_every_module_says_what_it_is():
    silent = [path for path in PACKAGE if path.name != "__init__.py" and ast.get_docstring(tree_of(path)) is None]
    assert not [str(path.relative_to(ROOT)) for path in silent]


def find_mesh_axes(tree: ast.Module) -> list[int]:
    """Returns the lines with the literal name of a mesh axis; `folder / "data"` is a file's name."""
    operands = (node.right for node in ast.walk(tree) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div))
    file_names = {id(operand) for operand in operands}
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in file_names)
    return [node.lineno for node in constants if node.value in MESH_AXES]


def test_mesh_axes_are_named_where_arrays_are_placed_and_nowhere_else():
    """All other code names dims: a new axis is a line of the tables."""
    files = {str(path.relative_to(ROOT)): find_mesh_axes(tree_of(path)) for path in PACKAGE}
    named = {name: lines for name, lines in files.items() if lines}
    assert named.keys() == NAME_MESH_AXES, named


def test_a_mesh_axis_is_found_and_a_folder_is_not():
    lines = ['PartitionSpec("data")', 'folder / "data"', 'axis_names={"pipe"}', '"""Over data."""']
    assert find_mesh_axes(ast.parse("\n".join(lines))) == [1, 3]


def test_nothing_names_a_place_on_one_machine():
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in MACHINE_PATH.finditer(text)]
    assert not found, "\n".join(found)


def test_no_unfinished_work_is_left_in_the_sources():
    marks = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    others = [path for path in SOURCES if path != Path(__file__).resolve()]
    assert not [str(path.relative_to(ROOT)) for path in others if marks.search(path.read_text(encoding="utf-8"))]


def test_models_know_no_platform():
    """What one platform does better than another is in `engine/`, and a model is given functions."""
    words = re.compile(
        r"\b(CPUs?|GPUs?|TPUs?|cuDNN|optimization_barrier|platform_dependent|default_backend)\b|\.platform\b"
    )
    models = (ROOT / "realjax" / "models").rglob("*.py")
    assert not {path.name: found for path in models if (found := words.findall(path.read_text(encoding="utf-8")))}
