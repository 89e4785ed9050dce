"""The text of --help."""

import re

import pytest

from realjax.core.optimizer_config import OptimizerConfig
from realjax.options.describe import describe_options
from realjax.options.fields import list_options
from realjax.options.generation import GenerationOptions
from realjax.options.parallel import MFCConfig
from realjax.options.parsing import parse_overrides
from realjax.options.rl import PPOConfig, PPOHyperparameters
from realjax.options.supervised import SFTConfig
from realjax.options.values import type_label


def test_help_holds_every_option_with_type_default_and_meaning(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    lines = describe_options(SFTConfig, "sft").splitlines()
    for option in list_options(SFTConfig):
        (index,) = [i for i, line in enumerate(lines) if line.startswith(f"  {option.path} ")]
        default = "null" if option.default is None else str(option.default)
        assert type_label(option.annotation) in lines[index]
        assert default in lines[index].split("default ")[1]
        assert lines[index + 1].strip().startswith(option.help[:40])


def test_help_holds_every_other_spelling():
    text = describe_options(SFTConfig, "sft")
    for name in [*SFTConfig.ALIASES, *SFTConfig.NO_EFFECT]:
        assert name in text


def test_help_fits_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = describe_options(SFTConfig, "sft").splitlines()
    assert all(line == line.rstrip() for line in lines)
    assert all(len(line) <= 80 for line in lines if line.startswith("      "))


def test_help_tells_the_range_that_is_checked():
    """Whatever has a range is refused outside of it, and its line of the help says which it is."""
    lines = {line.split()[0]: line for line in describe_options(PPOConfig, "ppo").splitlines() if ", default " in line}
    ranged = [option for option in list_options(PPOConfig) if str(option.range)]
    assert {option.owner for option in ranged} > {OptimizerConfig, GenerationOptions, PPOHyperparameters, MFCConfig}
    for option in ranged:
        assert lines[option.path].endswith(str(option.range))
        least = option.range.at_least if option.range.at_least is not None else option.range.above
        assert least is not None
        with pytest.raises(ValueError, match=rf"^{re.escape(option.path)}: found {-1 + least}.*; it must be "):
            parse_overrides(PPOConfig, [f"{option.path}={-1 + least}"])
