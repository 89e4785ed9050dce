"""How an option is declared, and a walk over the options of a tree of dataclasses."""

import dataclasses
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from typing import Any, get_type_hints

# Of whole numbers without a bound of their own: steps and tokens are counted in 32 bits.
MOST = 2**31 - 1


def option(
    default: Any = MISSING,
    help: str = "",  # noqa: A002 - the field's own word
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Any:
    """Returns the field of one option; without `default` it is required. `check_bounds` checks the bounds."""
    bounds = {name: bound for name, bound in {"at_least": at_least, "at_most": at_most}.items() if bound is not None}
    return dataclasses.field(default=default, metadata={"help": help, **bounds})


def group(cls: type, **changes: Any) -> Any:
    """Returns the field of a nested dataclass whose defaults are those of `cls` with `changes`."""
    return dataclasses.field(default_factory=lambda: cls(**changes))


def check_bounds(config: Any) -> None:
    """Raises ValueError for the first option of `config` outside its bounds; None is always allowed."""
    for field in dataclasses.fields(config):
        value, least = getattr(config, field.name), field.metadata.get("at_least")
        most = field.metadata.get("at_most", MOST if type(value) is int else None)
        if value is not None and least is not None and value < least:
            raise ValueError(f"{field.name}: found {value}; it must be at least {least}")
        if value is not None and most is not None and value > most:
            raise ValueError(f"{field.name}: found {value}; it must be at most {most}")


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option as the user sees it: its dotted path from the root, and the dataclass that owns it."""

    path: str
    annotation: Any
    default: Any
    help: str
    owner: type


def list_options(cls: type) -> list[Option]:
    """Returns every option beneath `cls`, in declaration order; a required option has the default MISSING."""
    return list(_walk(cls, None, ""))


def list_aliases(cls: Any, prefix: str = "") -> dict[str, str]:
    """Returns the other spelling of each option or group that has one, by its dotted path from the root."""
    aliases = {prefix + path: prefix + name for name, path in getattr(cls, "ALIASES", {}).items()}
    for name, annotation in get_type_hints(cls).items():
        if dataclasses.is_dataclass(annotation):
            aliases |= list_aliases(annotation, f"{prefix}{name}.")
    return aliases


def _walk(cls: Any, instance: Any, prefix: str) -> Iterator[Option]:
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        path, annotation, default = prefix + field.name, hints[field.name], default_of(field, instance)
        if dataclasses.is_dataclass(annotation):
            yield from _walk(annotation, None if default is MISSING else default, f"{path}.")
        else:
            help_text = field.metadata.get("help", "")
            yield Option(path=path, annotation=annotation, default=default, help=help_text, owner=cls)


def default_of(field: dataclasses.Field, instance: Any = None) -> Any:
    """Returns the field's value in `instance`, else its declared default, else MISSING."""
    if instance is not None:
        return getattr(instance, field.name)
    return field.default if field.default_factory is MISSING else field.default_factory()


def instances_of(config: Any, kind: Any) -> dict[str, Any]:
    """Returns the direct fields of `config` that hold a `kind`, by name."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: value for name, value in values.items() if isinstance(value, kind)}
