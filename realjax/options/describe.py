"""The text of `--help`, made from the options' own declarations."""

import shutil
from itertools import groupby
from textwrap import fill
from typing import Any

from realjax.options.fields import Option, list_options
from realjax.options.values import type_label

WIDEST = 100


def describe_options(cls: type, experiment: str) -> str:
    """Returns every option of `cls` with its type, default and meaning, grouped by its place in the tree."""
    width = min(WIDEST, shutil.get_terminal_size().columns)
    options = list_options(cls)
    name_width = max(len(option.path) for option in options)
    parts = [
        fill(f"realjax {experiment}: {_first_sentence(cls)}", width),
        f"\nUsage: realjax {experiment} key=value ...\n",
        fill("null is None. A list is written [1,2]. The last of several values for one key counts.", width),
    ]
    for parent, members in groupby(options, key=lambda option: option.path.rpartition(".")[0]):
        parts.append(_describe_group(parent, list(members), cls, name_width, width))
    return "\n".join(parts)


def _describe_group(parent: str, options: list[Option], root: type, name_width: int, width: int) -> str:
    owner = options[0].owner
    lines = ["", fill(f"{parent}: {_first_sentence(owner)}", width) if parent else "The run:"]
    other_names = {path: name for name, path in getattr(root, "ALIASES", {}).items()}
    for option in options:
        facts = f"{type_label(option.annotation)}, default {_default_text(option.default)}"
        also = f" (also: {other_names[option.path]})" if option.path in other_names else ""
        lines.append(f"  {option.path:{name_width}}  {facts}")
        lines.append(fill(option.help + also, width, initial_indent=" " * 6, subsequent_indent=" " * 6))
    if no_effect := getattr(owner, "NO_EFFECT", {}):
        lines.append(fill(f"  Accepted without effect: {', '.join(no_effect)}.", width, subsequent_indent="  "))
    return "\n".join(lines)


def _first_sentence(cls: type) -> str:
    return (cls.__doc__ or "").split("\n")[0].split(". ")[0].rstrip(".") + "."


def _default_text(value: Any) -> str:
    return "null" if value is None else repr(value) if value == "" else str(value)
