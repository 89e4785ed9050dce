"""Runs a recipe: `python -m launch.main --config=configs/sft.py --config.model.path=... --config.<option>=value`."""

import re
import sys
from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from realjax.apps.errors import end_process, report_errors
from realjax.apps.log import configure_logging
from realjax.apps.quickstart import PLAN_FLAG, find_experiment, run_experiment
from realjax.options.config_dict import EXPERIMENT_KEY, from_config_dict
from realjax.options.parsing import convert_target, locate

OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]+)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the recipe that `--config` names, with `--config.<option>=value` applied, and returns the exit code.

    With `--plan` it prints where each call would run, and stops.
    """
    args = list(sys.argv if argv is None else argv)
    if any(arg in ("--help", "-h") for arg in args):
        print(f"{__doc__}\n\nThe recipe says what to expect, and realjax <experiment> --help all lists the options.")
        return 0
    with report_errors() as end:
        config = read_config([arg for arg in args if arg != PLAN_FLAG])
        name = str(config[EXPERIMENT_KEY])
        configure_logging()
        options = from_config_dict(find_experiment(name).config_cls, config)
        end.code = run_experiment(name, options, args[1:])
    return end.code


def read_config(argv: Sequence[str]) -> ConfigDict:
    """Returns the recipe with its overrides. ValueError for a missing recipe, an unknown option or a wrong value."""
    recipe, _ = _parse_flags([arg for arg in argv if not OVERRIDE.match(arg)])
    if not isinstance(recipe, ConfigDict) or EXPERIMENT_KEY not in recipe:
        raise ValueError(
            "--config: found no file whose get_config() returns a ConfigDict with the key 'experiment'; "
            "give a recipe, such as --config=configs/sft.py"
        )
    # Checked here, since absl does not know which options are near the one that was meant.
    config_cls = find_experiment(str(recipe[EXPERIMENT_KEY])).config_cls
    config, unused = _parse_flags([flag for word in argv for flag in _write_out(config_cls, word)])
    if unused:
        raise ValueError(f"command line: {unused[0]!r} is no flag; options are written --config.<name>=value")
    return config


def _write_out(config_cls: type, word: str) -> list[str]:
    """Returns a word of the command line, as a flag for each option where it gives a group of them in short."""
    override = OVERRIDE.match(word)
    if override is None:
        return [word]
    target = locate(config_cls, override[1])
    if not is_dataclass(target.annotation):
        return [word]
    text = word[override.end() :].removeprefix("=")
    found = convert_target(target, override[1], text)
    return [f"--config.{path}={'null' if value is None else value}" for path, _, value in found]


def _parse_flags(argv: Sequence[str]) -> tuple[Any, list[str]]:
    """Returns the value of `--config` with the overrides in `argv`, and the words that are no flags."""
    # Flags of this command alone: absl's global ones would mix with those of imported libraries.
    flag_values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", help_string="Recipe file, such as configs/sft.py.", flag_values=flag_values, sys_argv=list(argv)
    )
    try:
        unused = flag_values(list(argv))[1:]
    except (flags.Error, TypeError) as error:
        raise ValueError(f"command line: {error}") from error
    except (Exception, SystemExit) as error:  # a recipe is Python, so anything can go wrong in it
        raise ValueError(f"--config: the recipe raised {type(error).__name__}: {error}; mend it") from error
    return flag_values["config"].value, unused


if __name__ == "__main__":
    end_process(main())
