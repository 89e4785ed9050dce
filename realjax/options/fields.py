"""A walk over the options of a tree of dataclasses, which `core/option.py` declares."""

import dataclasses
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from typing import Any, TypeVar, get_type_hints

from realjax.core.option import DataclassInstance, Range

Kind = TypeVar("Kind")


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option as the user sees it: its dotted path from the root, and the dataclass that owns it."""

    path: str
    annotation: object
    default: object
    help: str
    range: Range
    owner: type


def list_options(cls: type) -> list[Option]:
    """Returns every option beneath `cls`, in declaration order; a required option has the default MISSING."""
    return list(_walk(cls, None, ""))


def list_aliases(cls: type, prefix: str = "") -> dict[str, str]:
    """Returns the other spelling of each option or group that has one, by its dotted path from the root."""
    aliases = {prefix + path: prefix + name for name, path in getattr(cls, "ALIASES", {}).items()}
    for name, annotation in get_type_hints(cls).items():
        if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
            aliases |= list_aliases(annotation, f"{prefix}{name}.")
    return aliases


def _walk(cls: type[DataclassInstance], instance: object, prefix: str) -> Iterator[Option]:
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        path, annotation, default = prefix + field.name, hints[field.name], find_default(field, instance)
        if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
            yield from _walk(annotation, None if default is MISSING else default, f"{path}.")
        else:
            told = {"help": field.metadata.get("help", ""), "range": field.metadata.get("range", Range())}
            yield Option(path=path, annotation=annotation, default=default, owner=cls, **told)


def find_default(field: dataclasses.Field, instance: object = None) -> Any:
    """Returns the field's value in `instance`, else its declared default, else MISSING."""
    if instance is not None:
        return getattr(instance, field.name)
    return field.default if field.default_factory is MISSING else field.default_factory()


def find_instances(config: DataclassInstance, kind: type[Kind] | tuple[type[Kind], ...]) -> dict[str, Kind]:
    """Returns the direct fields of `config` that hold a `kind`, by name."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: value for name, value in values.items() if isinstance(value, kind)}
