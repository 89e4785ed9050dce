"""The words of a command that are no options of a run: help, version, a file of options."""

import dataclasses
import importlib.metadata
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from realjax.apps import named_recipes
from realjax.apps.named_recipes import read_recipe
from realjax.options.common import CommonExperimentConfig
from realjax.options.describe import describe_options
from realjax.options.short_help import describe_common, search_options

HELP_FLAGS, VERSION_FLAGS = ("--help", "-h", "help"), ("--version", "-V")
CONFIG_FLAG, PRINT_FLAG = "--config", "--print-config"
OPTION_FILES = (".yaml", ".yml", ".json")


def say(text: str) -> None:
    """Prints what was asked for; a reader that has seen enough (`| head`) is no error."""
    try:
        print(text, end="" if text.endswith("\n") else "\n", flush=True)
    except BrokenPipeError:
        # Python would flush the rest as it ends, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say_version() -> None:
    """Prints the version of realjax and of what decides about its programs."""
    names = ("realjax", "jax", "jaxlib", "transformers")
    say("\n".join(f"{name} {importlib.metadata.version(name)}" for name in names))


def help_topic(words: list[str]) -> str | None:
    """Returns what help was asked about, "" for the short one; None where none was."""
    for place, word in enumerate(words):
        if word in HELP_FLAGS:
            return words[place + 1] if place + 1 < len(words) and "=" not in words[place + 1] else ""
    return None


def describe(cls: type[CommonExperimentConfig], experiment: str, topic: str) -> str:
    """Returns the help on a topic: "", "all", or a word to look for. ValueError where nothing has the word."""
    if not topic:
        return describe_common(cls, experiment)
    return describe_options(cls, experiment) if topic == "all" else search_options(cls, experiment, topic)


def names_recipe(words: Sequence[str]) -> bool:
    """Returns whether words are a recipe's, `--config=configs/sft.py --config.<option>=value`, and no experiment's."""
    values = [after for word, after in zip(words, [*words, ""][1:], strict=True) if word == CONFIG_FLAG]
    values += [word.partition("=")[2] for word in words if word.startswith(f"{CONFIG_FLAG}=")]
    has_override = any(word.startswith(f"{CONFIG_FLAG}.") for word in words)
    return has_override or any(Path(value).suffix not in OPTION_FILES for value in values)


def take_option_files(
    words: Sequence[str], cls: type[CommonExperimentConfig], experiment: str
) -> tuple[list[str], tuple[Mapping[str, object], ...]]:
    """Returns the words without `--recipe NAME` and `--config FILE`, and the options of these, for `parse_overrides`.

    ValueError for a recipe that there is not, or a file without options.
    """
    rest, flags = split_option_files(words)
    read = {CONFIG_FLAG: read_config_file, named_recipes.FLAG: lambda name: read_recipe(name, cls, experiment)}
    return rest, tuple(read[flag](value) for flag, _, value in (word.partition("=") for word in flags))


def split_option_files(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the words without `--recipe NAME` and `--config FILE`, and those, written with `=`, recipes first."""
    rest, flags, words = [], [], list(words)
    while words:
        word = words.pop(0)
        name, equals, _ = word.partition("=")
        if name not in (CONFIG_FLAG, named_recipes.FLAG):
            rest.append(word)
        elif equals or words:
            flags.append(word if equals else f"{word}={words.pop(0)}")
        else:
            raise ValueError(f"{word}: nothing follows it; write {word} and a YAML file of options")
    return rest, sorted(flags, key=lambda flag: flag.startswith(CONFIG_FLAG))


def read_config_file(path: str) -> Mapping[str, object]:
    """Returns the options of a YAML file, nested or dotted. ValueError for a file that holds none."""
    try:
        found = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"--config: {path!r} cannot be read ({error.strerror}); give a YAML file of options"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--config: {path!r} is no YAML ({reason}); write options as `name: value`") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"--config: {path!r} holds no options; write them as `name: value`, nested or dotted")
    return {str(key): value for key, value in found.items()}


def print_config(config: CommonExperimentConfig) -> None:
    """Prints the options in force as YAML, which `--config` reads."""
    say(yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False))


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
