"""The text of --help."""

from realjax.options.describe import describe_options
from realjax.options.fields import list_options
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
