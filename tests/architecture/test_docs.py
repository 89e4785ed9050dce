"""The pages name only files, modules, functions and other pages that exist."""

import re

import pytest

from tools import sources

PAGES = [*sorted((sources.ROOT / "docs").glob("*.md")), sources.ROOT / "README.md", sources.ROOT / "CONTRIBUTING.md"]
# `<name>` stands for a name of the reader's choice.
FILE = re.compile(r"(?<![\w./<>-])([\w-]+(?:/[\w-]+)*\.(?:py|svg))\b")
NAME = re.compile(r"\b((?:realjax|launch|tools|tests|configs)(?:\.\w+)+(?::\w+(?:\.\w+)*)?)")
IN_FILE = re.compile(r"`(\w+)(?:\(\w*\))?` (?:of|in)\s`([\w/]+\.py)`")
LINK = re.compile(r"\]\(([^)#\s:]*)(?:#([\w-]+))?\)")
TABLE_ROW = re.compile(r"^\| `(\w+)` \|", re.M)


def find_file(name: str) -> bool:
    """Returns whether there is a file of that path, which may begin anywhere: `core/axes.py` is in realjax."""
    return any(path.is_file() for path in sources.ROOT.glob(name)) or any(
        path.as_posix().endswith(f"/{name}")
        for folder in ("realjax", "configs", "launch", "tools", "tests", "docs")
        for path in (sources.ROOT / folder).rglob(name.rsplit("/", 1)[-1])
    )


def find_faults(text: str) -> list[str]:
    """Returns the names in a page's text that nothing answers to."""
    faults = [name for name in FILE.findall(text) if not find_file(name)]
    faults += [name for name in NAME.findall(text) if not (sources.resolves(name) or resolves_dotted(name))]
    for name, file in IN_FILE.findall(text):
        paths = [path for path in (sources.ROOT / "realjax" / file, sources.ROOT / file) if path.is_file()]
        faults += [f"{name} of {file}" for path in paths if not sources.defines(path, name)]
    return faults


def resolves_dotted(name: str) -> bool:
    """Returns whether a name such as `realjax.core.axes.resolve` is a module's."""
    module, _, inner = name.rpartition(".")
    return ":" not in name and sources.resolves(f"{module}:{inner}")


def find_anchors(text: str) -> set[str]:
    """Returns the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_what_exists(page):
    assert not find_faults(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        path = (page.parent / target) if target else page
        assert path.exists(), target
        assert not anchor or anchor in find_anchors(path.read_text(encoding="utf-8")), f"{target}#{anchor}"


def test_the_page_of_the_house_has_a_row_for_every_folder():
    text = (sources.ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert set(TABLE_ROW.findall(text)) == set(sources.list_packages())


def test_what_is_not_there_is_found():
    """The check itself: a wrong name of each form among right ones."""
    right = "`core/axes.py`, `resolve` of `core/axes.py`, realjax.core.layout:Layout.mesh, `algorithms/<name>.py`, "
    wrong = ["core/axles.py", "realjax.core.layout:Layout.mess", "solve of core/axes.py"]
    assert find_faults(right + "`core/axles.py`, realjax.core.layout:Layout.mess, `solve` of `core/axes.py`") == wrong
