"""The commands of the README and the pages of docs/, as their fenced blocks of shell have them."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.given.processes import ROOT

FENCE = re.compile(r"^([ ]*)```(\w*)\n(.*?)^\1```", re.S | re.M)
ASSIGNMENT = re.compile(r"\w+=\$\(")


@dataclass(frozen=True)
class PageCommand:
    """A command of a page; `words` are those that a shell would pass on, variables as they are written."""

    page: str
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def list_pages() -> list[Path]:
    """Returns the README and the pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def list_commands() -> list[PageCommand]:
    """Returns every command of every page, in order; assignments to variables are none."""
    return [command for page in list_pages() for command in read_page(page.name, page.read_text(encoding="utf-8"))]


def read_page(name: str, text: str) -> Iterator[PageCommand]:
    """Yields the commands of a page's blocks of shell; a block that is a whole script is none."""
    for block in FENCE.finditer(text):
        if block[2] not in ("sh", "bash", "shell", "console") or block[3].lstrip().startswith("#!"):
            continue
        first = text.count("\n", 0, block.start(3)) + 1
        for line, command in join_lines(block[3], first):
            words = tuple(shlex.split(command, comments=True))
            if words and not ASSIGNMENT.match(command):
                yield PageCommand(name, line, words)


def join_lines(block: str, first: int) -> Iterator[tuple[int, str]]:
    """Yields the commands of a block, lines that end in a backslash joined, with the number of their first line."""
    begun, start = "", first
    for number, line in enumerate(block.splitlines(), first):
        if not begun:
            start = number
        if line.endswith("\\"):
            begun += line[:-1] + " "
            continue
        yield start, begun + line
        begun = ""


def find_unmarked(text: str) -> list[str]:
    """Returns lines of blocks of no language that begin as a command does: they should be marked as shell."""
    blocks = [block[3] for block in FENCE.finditer(text) if not block[2]]
    return [line for block in blocks for line in block.splitlines() if re.match(r"(realjax|python3?|pip|make) ", line)]
