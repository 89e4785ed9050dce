"""Options as a ConfigDict: round trips, and the recipe's command line against the quickstart's."""

import dataclasses
import json
from pathlib import Path

import pytest

from realjax.apps.recipe import read_config
from realjax.options.config_dict import from_config_dict, to_config_dict, to_json
from realjax.options.fields import list_options
from realjax.options.parsing import build, parse_overrides
from realjax.options.supervised import SFTConfig
from tests.options.test_parsing import QUICKSTART_SFT, V03_SFT

# ml_collections 1.1 loads recipes by a method that Python is giving up.
pytestmark = pytest.mark.filterwarnings(r"ignore:the load_module\(\) method is deprecated:DeprecationWarning")

RECIPE = Path(__file__).parents[2] / "configs" / "sft.py"
# The quickstart's command in v0.3's names, so that v0.3 values can override it.
QUICKSTART_V03 = [
    f"{SFTConfig.ALIASES.get(key, key)}={text}" for key, _, text in (t.partition("=") for t in QUICKSTART_SFT)
]
PATHS = [text for text in QUICKSTART_SFT if "path" in text]


def read(*flags):
    return from_config_dict(SFTConfig, read_config(["launch", f"--config={RECIPE}", *flags]))


@pytest.mark.parametrize("overrides", [[], QUICKSTART_SFT, V03_SFT])
def test_round_trips_give_an_equal_config(overrides):
    config = parse_overrides(SFTConfig, overrides)
    assert from_config_dict(SFTConfig, to_config_dict(config, experiment="sft")) == config
    assert build(SFTConfig, json.loads(to_json(config))) == config


def test_the_class_gives_its_defaults():
    assert from_config_dict(SFTConfig, to_config_dict(SFTConfig)) == SFTConfig()


def test_aliases_are_the_option_itself():
    config = to_config_dict(SFTConfig)
    config.save_freq_steps = 7
    assert config.exp_ctrl.save_freq_steps == 7
    config.exp_ctrl.total_train_epochs = 3
    assert config.total_train_epochs == 3


def test_the_recipe_is_the_quickstart_command():
    assert read(*(f"--config.{text}" for text in PATHS)) == parse_overrides(SFTConfig, QUICKSTART_SFT)


def test_every_option_can_be_set_on_the_recipes_command_line():
    for item in list_options(SFTConfig):
        text = "null" if item.default is None else str(item.default)
        value = read(f"--config.{item.path}={text}")
        for name in item.path.split("."):
            value = getattr(value, name)
        assert value == item.default, item.path


def test_recipe_flags_equal_quickstart_overrides():
    assert read(*(f"--config.{text}" for text in V03_SFT)) == parse_overrides(SFTConfig, [*QUICKSTART_V03, *V03_SFT])


def test_recipes_take_other_spellings():
    texts = [
        "total_train_epochs=2",
        "save_freq_steps=null",
        "eval_freq_secs=9",
        "cache_clear_freq=10",
        "model.backend=x",
    ]
    changes = {"total_train_epochs": 2, "save_freq_steps": None, "eval_freq_secs": 9}
    expected = dataclasses.replace(read(), exp_ctrl=dataclasses.replace(read().exp_ctrl, **changes))
    assert read(*(f"--config.{text}" for text in texts)) == expected


def test_recipes_take_groups_in_short():
    texts = ["model.lora=4", "model.type=qwen2-7"]
    found, expected = read(*(f"--config.{text}" for text in texts)).model, parse_overrides(SFTConfig, texts).model
    assert (found.lora, found.type) == (expected.lora, expected.type)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.model.lora=many"], "^model.lora: found 'many'; it needs a rank"),
        (["--config.model.optimzer.lr=1"], "^unknown option model.optimzer.lr: .*did you mean model.optimizer.lr"),
        (["--config.model.optimizer.lr=abc"], "^command line: .*--config.model.optimizer.lr=abc"),
        (["--config.allocation.n_mbs=1.5"], "^allocation.n_mbs: found 1.5; it needs int"),
        (["model.path=x"], "^command line: 'model.path=x' is no flag; options are written --config"),
        (["--confg=x"], "^command line: Unknown command line flag 'confg'"),
    ],
)
def test_wrong_flags_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        read(*flags)


@pytest.mark.parametrize("flags", [[], ["--config=no_such_recipe.py"]])
def test_a_missing_recipe_is_refused(flags):
    with pytest.raises(ValueError, match="^--config: found no file"):
        read_config(["launch", *flags])
