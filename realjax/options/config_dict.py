"""Options as an `ml_collections.ConfigDict` and as JSON."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, TypeVar, get_type_hints

from ml_collections import ConfigDict, config_dict

from realjax.core.option import DataclassInstance
from realjax.options.parsing import build
from realjax.options.values import optional_members

Config = TypeVar("Config")
EXPERIMENT_KEY = "experiment"


def to_config_dict(config: DataclassInstance | type[DataclassInstance], *, experiment: str | None = None) -> ConfigDict:
    """Returns the options of a dataclass, or of an instance of one, as a ConfigDict.

    Aliases are references to the option they stand for, and names without effect are None, so that both can be set from
    a command line. `experiment` names the experiment that the recipe is for.
    """
    instance = config() if isinstance(config, type) else config
    result = ConfigDict({} if experiment is None else {EXPERIMENT_KEY: experiment})
    hints = get_type_hints(type(instance))
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        is_group = dataclasses.is_dataclass(value)
        result[field.name] = to_config_dict(value) if is_group else _holder(value, hints[field.name])
    for name, target in getattr(instance, "ALIASES", {}).items():
        *parents, last = target.split(".")
        owner: Any = result
        for parent in parents:
            owner = owner[parent]
        result[name] = owner.get_ref(last)
    for name in getattr(instance, "NO_EFFECT", {}):
        result[name] = config_dict.placeholder(object)
    return result


def _holder(value: object, annotation: object) -> object:
    """Returns what holds an option in a ConfigDict: the value, or a field that also takes None.

    ml_collections gives a typed field its type's parser, which knows no `null`; a field of objects reads it as text,
    and `parsing.build` checks the type.
    """
    inner = optional_members(annotation)
    if inner is None:
        return tuple(value) if isinstance(value, list | tuple) else value
    return config_dict.FieldReference(value, field_type=str if inner is str else object)


def from_config_dict(cls: type[Config], config: ConfigDict | Mapping[str, object]) -> Config:
    """Returns `cls` with the values of `config`, checked as command-line options are."""
    values = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    values.pop(EXPERIMENT_KEY, None)
    return build(cls, values)


def to_json(config: DataclassInstance) -> str:
    """Returns the options as indented JSON; `parsing.build` of the loaded text gives an equal instance."""
    return json.dumps(dataclasses.asdict(config), indent=2)
