"""Recipes by name, `realjax ppo --recipe ppo-small key=value ...`: options that go together, a file of each."""

import dataclasses
import importlib.util
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from realjax.core.option import DataclassInstance
from realjax.options.config_dict import EXPERIMENT_KEY, from_config_dict
from realjax.options.parsing import flatten, nearest_names

FLAG = "--recipe"
COLUMNS = 80
# In an installed package beside this file, in a checkout where a person reads and changes them.
FOLDERS = (Path(__file__).parent / "recipes", Path(__file__).parents[2] / "configs")


def list_recipes(experiment: str) -> str:
    """Returns a line for each recipe of an experiment: its name, and what it is for."""
    summaries = {name: (module.__doc__ or "").partition("\n")[0] for name, module in _find(experiment).items()}
    if not summaries:
        return f"{experiment} has no recipes."
    width = max(map(len, summaries)) + 4
    lines = [f"Recipes of {experiment} ({FLAG} NAME takes one, with --print-config shows it):"]
    for name, summary in summaries.items():
        lines += textwrap.wrap(summary, COLUMNS, initial_indent=f"  {name}".ljust(width), subsequent_indent=" " * width)
    return "\n".join(lines)


def asks_for_list(words: Sequence[str]) -> bool:
    """Returns whether a recipe is asked for and none is named."""
    return any(
        word in (FLAG, f"{FLAG}=") and (word != FLAG or after.startswith("-") or "=" in after or not after)
        for word, after in zip(words, [*words, ""][1:], strict=True)
    )


def read_recipe(name: str, cls: type[DataclassInstance], experiment: str) -> Mapping[str, object]:
    """Returns the options that a recipe sets, dotted. ValueError for a name that no recipe of the experiment has."""
    recipes = _find(experiment)
    if name not in recipes:
        near = nearest_names(name, recipes, count=1)
        hint = f"did you mean {near[0]}?" if near else f"{FLAG} without a name says what they are for"
        raise ValueError(f"{FLAG}: {experiment} has no recipe {name!r}; it has {', '.join(recipes)}; {hint}")
    values = flatten(dataclasses.asdict(from_config_dict(cls, recipes[name].get_config())))
    defaults = dict(flatten(dataclasses.asdict(cls())))
    return {path: value for path, value in values if value != defaults[path]}


def _find(experiment: str) -> dict[str, Any]:
    """Returns the modules of an experiment's recipes by name."""
    folder = next(folder for folder in FOLDERS if folder.is_dir())
    paths = sorted(path for path in folder.glob("*.py") if not path.stem.startswith("_"))
    modules = {path.stem.replace("_", "-"): _load(path) for path in paths}
    return {name: module for name, module in modules.items() if module.get_config()[EXPERIMENT_KEY] == experiment}


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"realjax_recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None, "a recipe is a Python file"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
