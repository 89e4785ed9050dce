"""The words of a command that are no options: version, files of options, pipes; and `data check`."""

import subprocess
import sys

import pytest
import yaml

from realjax.apps import data_check, quickstart
from realjax.apps.words import help_topic, take_option_files
from realjax.options.parsing import parse_overrides
from realjax.options.supervised import SFTConfig
from tests.data.test_chat_masks import TALK
from tests.given.templates import QWEN
from tests.given.texts import write_jsonl


def test_version_and_topics(capsys):
    assert quickstart.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("realjax ")
    assert help_topic(["a=1"]) is None and help_topic(["a=1", "--help"]) == "" and help_topic(["-h", "clip"]) == "clip"
    assert quickstart.main(["ppo", "--help", "clip"]) == 0
    assert "ppo.eps_clip=" in capsys.readouterr().out
    assert quickstart.main(["ppo", "--help", "nonsense"]) == 2


def test_a_closed_pipe_is_no_error():
    """As `realjax sft --help all | head -1`: the reader is gone before all is written."""
    code = "from realjax.apps.words import say\nsay('line\\n' * 200_000)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == b"line\n"
    process.stdout.close()
    assert process.stderr and process.stderr.read() == b"" and process.wait() == 0
    process.stderr.close()


def test_a_file_of_options_comes_before_the_command_line(tmp_path, capsys):
    file = tmp_path / "sft.yaml"
    data = "dataset:\n  max_seqlen: 64\n  train_path: rows.jsonl\n  valid_path: [a=b.jsonl, c=d.jsonl]\n"
    file.write_text(f"seed: 5\n{data}model.path: m\n")
    words, layers = take_option_files(["--config", str(file), "seed=6"], SFTConfig, "sft")
    config = parse_overrides(SFTConfig, words, *layers)
    assert (config.seed, config.dataset.max_seqlen, config.model.path) == (6, 64, "m")
    assert config.dataset.valid_path == ("a=b.jsonl", "c=d.jsonl")
    assert quickstart.main(["sft", f"--config={file}", "seed=6", "--print-config"]) == 0
    again = tmp_path / "again.yaml"
    again.write_text(capsys.readouterr().out)
    assert parse_overrides(SFTConfig, [], yaml.safe_load(again.read_text())) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [("- 1", "holds no options"), ("a: [", "is no YAML"), (None, "cannot be read"), ("seet: 1", "did you mean seed")],
)
def test_a_bad_file_of_options_is_refused(tmp_path, capsys, content, message):
    file = tmp_path / "sft.yaml"
    if content is not None:
        file.write_text(content)
    assert quickstart.main(["sft", f"--config={file}"]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    QWEN.tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text("{}")
    return folder


def test_data_check_shows_rows_as_they_are_learned(tmp_path, model, capsys):
    rows = [{"messages": TALK[:2]}, {"messages": TALK}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert quickstart.main(["data", "check", str(path), f"model={model}", "rows=1", "max_seqlen=40"]) == 0
    out = capsys.readouterr().out
    assert "rows with messages: conversations" in out
    assert "<|im_start|>assistant\n⟦was good<|im_end|>⟧\n" in out and "never" not in out
    assert "2 sequences" in out and "longer than 40: " in out


@pytest.mark.parametrize(
    ("experiment", "row", "shown"),
    [
        ("rw", {"prompt": "so", "chosen": " good", "rejected": " dull"}, "⟦ good<|im_end|>⟧"),
        ("kto", {"prompt": "so", "completion": " good", "label": True}, "⟦ good<|im_end|>⟧"),
        ("ppo", {"messages": TALK}, "<|im_start|>assistant\n"),
    ],
)
def test_data_check_of_other_kinds(tmp_path, model, capsys, experiment, row, shown):
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    assert data_check.main([str(path), f"model={model}", f"experiment={experiment}"]) == 0
    assert shown in capsys.readouterr().out


def test_data_check_refuses_in_a_line(tmp_path, model, capsys):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"body": "so"}])
    for words in (["model=m"], [str(path), "more"], [str(path)], [str(path), f"model={model}"]):
        assert data_check.main(words) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert data_check.main(["--help"]) == 0
