"""What `realjax chat` and `realjax sample` share: their words, and the devices that they need."""

import logging
import os
from collections.abc import Sequence
from typing import TypeVar

import jax

from realjax.apps.devices import prepare_devices, prepare_environment
from realjax.apps.log import configure_logging
from realjax.apps.words import HELP_FLAGS, say
from realjax.options.describe import describe_options
from realjax.options.parsing import parse_overrides
from realjax.options.paths import find_fileroot
from realjax.options.talk import TalkConfig

Config = TypeVar("Config", bound=TalkConfig)


def read_words(words: Sequence[str], config_cls: type[Config], name: str) -> tuple[list[str], Config] | None:
    """Returns the models, which are words without `=`, and the options; None where help was asked for, which is printed
    then. Raises ValueError for no model, an unknown option or a wrong value."""
    if any(word in HELP_FLAGS for word in words):
        say(describe_options(config_cls, name, "MODEL"))
        return None
    models = [word for word in words if "=" not in word]
    if not models:
        raise ValueError(
            f"no model is named; write realjax {name} MODEL, a Hugging Face directory such as a run saves, or a hub "
            "identifier"
        )
    return models, parse_overrides(config_cls, [word for word in words if "=" in word])


def take_devices(config: TalkConfig) -> tuple[jax.Device, ...]:
    """Returns the devices that the models answer on. ValueError where there are too few."""
    configure_logging()
    prepare_environment(config, None)
    # What a run tells of its programs would stand in the midst of the talk.
    logging.getLogger("realjax").setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return prepare_devices(1, config.model_parallel_size, find_fileroot(config.fileroot) / ".cache" / "jax")
