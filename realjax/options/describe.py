"""The text of `--help all`, made from the options' own declarations."""

import shutil
from textwrap import fill

from realjax.options.fields import Option, list_aliases, list_options
from realjax.options.values import type_label

WIDEST = 100


def describe_options(cls: type, command: str, names: str = "") -> str:
    """Returns every option of `cls` with its type, default and meaning, grouped by its place in the tree.

    `names` are what the command needs before its options.
    """
    width = min(WIDEST, shutil.get_terminal_size().columns)
    options = list_options(cls)
    name_width = max(len(option.path) for option in options)
    parts = [
        fill(f"realjax {command}: {first_sentence(cls)}", width),
        f"\nUsage: realjax {' '.join(filter(None, [command, names]))} key=value ...\n",
        fill("null is None. A list is written [1,2]. The last of several values for one key counts.", width),
    ]
    aliases = list_aliases(cls)
    # A subclass may add options to a group that its base began.
    for parent in dict.fromkeys(_parent(option) for option in options):
        members = [option for option in options if _parent(option) == parent]
        parts.append(_describe_group(parent, members, aliases, name_width, width))
    return "\n".join(parts)


def _describe_group(parent: str, options: list[Option], aliases: dict[str, str], name_width: int, width: int) -> str:
    owner = options[0].owner
    heading = f"{parent}: {first_sentence(owner)}{_other_name(parent, aliases)}" if parent else "The run:"
    lines = ["", fill(heading, width)]
    for option in options:
        facts = f"{type_label(option.annotation)}, default {default_text(option.default)}"
        facts += f", {option.range}" if str(option.range) else ""
        text = option.help + _other_name(option.path, aliases)
        lines.append(f"  {option.path:{name_width}}  {facts}")
        lines.append(fill(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6))
    if no_effect := getattr(owner, "NO_EFFECT", {}):
        lines.append(fill(f"  Accepted without effect: {', '.join(no_effect)}.", width, subsequent_indent="  "))
    return "\n".join(lines)


def _parent(option: Option) -> str:
    return option.path.rpartition(".")[0]


def _other_name(path: str, aliases: dict[str, str]) -> str:
    return f" (also: {aliases[path]})" if path in aliases else ""


def first_sentence(cls: type) -> str:
    """Returns what a class says of itself, up to its first full stop."""
    return (cls.__doc__ or "").split("\n")[0].split(". ")[0].rstrip(".") + "."


def default_text(value: object) -> str:
    """Returns a default as a command line spells it."""
    return "null" if value is None else repr(value) if value == "" else str(value)
