"""`key=value` arguments and nested mappings to an instance of an options dataclass."""

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from difflib import SequenceMatcher
from typing import Any, TypeVar, get_type_hints

from realjax.options.fields import find_default, list_options
from realjax.options.foreign import explain, translate
from realjax.options.values import NULL_TEXTS, convert, type_label, wrong_type

logger = logging.getLogger("realjax.options")
Config = TypeVar("Config")
LEAST_SIMILARITY = 0.6
# Names this much less like the key than the nearest one would only distract from it.
SIMILARITY_SPREAD = 0.15


def parse_overrides(cls: type[Config], overrides: Sequence[str], *layers: Mapping[str, object]) -> Config:
    """Returns `cls` with nested mappings, one over the other, and then `a.b=c` arguments applied: the last one wins.

    Hydra's spellings are read too: a leading `+`, quotes, backslash escapes, `null`. ValueError for an unknown key, a
    value of another type, two spellings of one option with different values, or a required option left out.
    """
    pairs: list[tuple[str, object]] = []
    for override, following in zip(overrides, [*overrides, ""][1:], strict=True):
        key, equals, text = override.partition("=")
        key = key.strip().lstrip("+")
        if not equals or not key or key.startswith("-"):
            raise _no_option(cls, override, following)
        pairs.append((key, text.strip()))
    return _assemble(cls, [*(list(flatten(layer)) for layer in layers), pairs])


def build(cls: type[Config], mapping: Mapping[str, object]) -> Config:
    """Returns `cls` with the values of a nested mapping, checked as `parse_overrides` checks them."""
    return _assemble(cls, [list(flatten(mapping))])


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a key means: the option or group at `path`, or, with a `no_effect` reason, nothing."""

    path: str
    annotation: object = None
    no_effect: str | None = None


def locate(cls: type, key: str) -> Target:
    """Returns what the dotted `key` means under `cls`, through its aliases. ValueError with near names if nothing."""
    owner: Any = cls
    path, parts = [], key.split(".")
    while parts:
        name = parts.pop(0)
        if name in getattr(owner, "ALIASES", {}):
            parts = owner.ALIASES[name].split(".") + parts
            continue
        if name in getattr(owner, "NO_EFFECT", {}):
            return Target(path=".".join([*path, name]), no_effect=owner.NO_EFFECT[name])
        hints = get_type_hints(owner)
        if name not in {field.name for field in dataclasses.fields(owner)}:
            raise _unknown_key(cls, key, ".".join(path), name)
        path.append(name)
        annotation = hints[name]
        if dataclasses.is_dataclass(annotation):
            owner = annotation
        elif parts:
            raise ValueError(f"{key}: {'.'.join(path)} is one value ({type_label(annotation)}), it has no '{parts[0]}'")
    return Target(path=".".join(path), annotation=annotation)


def _assemble(cls: type[Config], layers: Iterable[Iterable[tuple[str, object]]]) -> Config:
    """Options are given twice, in two spellings, within a layer; what another layer says of them is replaced."""
    tree: dict[str, object] = {}
    for layer in layers:
        tree |= _read_layer(cls, layer)
    return _construct(cls, _nest(tree), None, "")


def _read_layer(cls: type, pairs: Iterable[tuple[str, object]]) -> dict[str, object]:
    given: dict[str, tuple[str, object]] = {}
    for key, value in pairs:
        target = locate(cls, key)
        if target.no_effect is not None:
            # A recipe lists such names with None; only a value that somebody wrote is worth a line.
            if value is not None:
                logger.info("%s has no effect here: %s", key, target.no_effect)
            continue
        for path, spelling, converted in convert_target(target, key, value):
            earlier, earlier_value = given.get(path, (spelling, converted))
            if earlier != spelling and earlier_value != converted:
                raise ValueError(
                    f"{spelling}={converted} and {earlier}={earlier_value} are two spellings of one option with "
                    "different values; keep one"
                )
            given[path] = (spelling, converted)
    return {path: value for path, (_, value) in given.items()}


def convert_target(target: Target, key: str, value: object) -> list[tuple[str, str, object]]:
    """Returns (path, spelling, value) of each option that `key=value` sets: one, or all of a group given in short.

    ValueError for a value of another type, and for a group that has no short form.
    """
    annotation = target.annotation
    if not dataclasses.is_dataclass(annotation):
        return [(target.path, key, convert(value, annotation, key))]
    assert isinstance(annotation, type)
    from_text = getattr(annotation, "from_text", None)
    if from_text is None:
        names = [field.name for field in dataclasses.fields(annotation)]
        meant = next((f"; did you mean {key}.{name}={value}?" for name in ("train_path", "path") if name in names), "")
        raise wrong_type(key, value, f"{key}.<name>=value, since it is a group of options: {', '.join(names)}{meant}")
    is_null = getattr(annotation, "NULL_IS_DEFAULT", False) and (value is None or value in NULL_TEXTS)
    short = annotation() if is_null else from_text(convert(value, str, key), key)
    paths = {name: f"{target.path}.{name}" for name in dataclasses.asdict(short)}
    return [(path, path, getattr(short, name)) for name, path in paths.items()]


def _construct(cls: type, tree: Mapping[str, Any], default: Any, path: str) -> Any:
    """Builds children before parents, so that every check runs on the final values; errors get the full name."""
    hints, changes, missing = get_type_hints(cls), {}, []
    for field in dataclasses.fields(cls):
        name, kept = field.name, find_default(field, default)
        full_name = f"{path}.{name}".lstrip(".")
        if dataclasses.is_dataclass(hints[name]):
            if name in tree or kept is MISSING:
                child_default = None if kept is MISSING else kept
                changes[name] = _construct(hints[name], tree.get(name, {}), child_default, full_name)
        elif name in tree:
            changes[name] = tree[name]
        elif kept is MISSING:
            missing.append(f"{full_name} ({type_label(hints[name])})")
    if missing:
        raise ValueError(f"{', '.join(missing)}: required, but not given; add {missing[0].split(' ')[0]}=...")
    try:
        return cls(**changes) if default is None else dataclasses.replace(default, **changes)
    except ValueError as error:
        raise ValueError(_qualify(str(error), path)) from error


def _qualify(message: str, path: str) -> str:
    """Returns a group's own message with the full name of the option in front."""
    parent, _, name = path.rpartition(".")
    prefix = parent if message.startswith(f"{name}.") else path
    return f"{prefix}.{message}" if prefix else message


def flatten(mapping: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yields the values of a nested mapping, each with its dotted path."""
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _nest(flat: Mapping[str, object]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def _no_option(cls: type, word: str, following: str) -> ValueError:
    """The error of a word that is no `key=value`, with what is meant where it is spelled as other programs do."""
    remedy = "such as total_train_epochs=2 (or --help)"
    name, equals, value = word.lstrip("-").partition("=")
    if word.startswith("-") and name:
        if not equals and following and "=" not in following and not following.startswith("--"):
            value = following
        names = [option.path for option in list_options(cls)] + list(getattr(cls, "ALIASES", {}))
        known = name if name in names else translate(name, names)
        remedy = f"without dashes: {known or name}={value or 'value'} (or --help)"
    elif word.endswith((".yaml", ".yml", ".json")):
        remedy = f"or --config {name or word} for a file of options"
    return ValueError(f"argument {word!r}: expected key=value, {remedy}")


def _unknown_key(cls: type, key: str, where: str, name: str) -> ValueError:
    names = [option.path for option in list_options(cls)] + list(getattr(cls, "ALIASES", {}))
    meant = translate(key, names)
    note = explain(key)
    near = [meant] if meant is not None else nearest_names(key, names) if note is None else []
    hint = f"did you mean {' or '.join(near)}?" if near else "run with --help all to list all options"
    if note is not None:
        hint = f"{hint} ({note})" if near else note
    place = f"'{where}' has no option '{name}'" if where else f"there is no option '{name}' at the top level"
    return ValueError(f"unknown option {key}: {place}; {hint}")


def nearest_names(key: str, names: Iterable[str], count: int = 3) -> list[str]:
    """Returns up to `count` of the dotted `names` most like `key`, judged as a whole and by their last part."""

    def similarity(name: str) -> float:
        whole = SequenceMatcher(None, key, name).ratio()
        last = SequenceMatcher(None, key.rsplit(".", 1)[-1], name.rsplit(".", 1)[-1]).ratio()
        # The last part decides whether a name is near at all, the whole which of several it is.
        return max(whole, 0.8 * last + 0.2 * whole)

    ranked = sorted(((similarity(name), name) for name in names), key=lambda pair: (-pair[0], pair[1]))
    least = max(LEAST_SIMILARITY, ranked[0][0] - SIMILARITY_SPREAD) if ranked else LEAST_SIMILARITY
    return [name for score, name in ranked[:count] if score >= least]
