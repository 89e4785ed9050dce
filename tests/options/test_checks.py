"""Checks over several options, names that a run fills in, notices, and paths."""

import dataclasses
from pathlib import Path

import pytest

from realjax.allocation.modes import check_options
from realjax.options.checks import list_notices, resolve_names, validate
from realjax.options.datasets import name_sets
from realjax.options.parallel import allocation_options
from realjax.options.parsing import parse_overrides
from realjax.options.paths import check_writable, find_fileroot, run_paths
from realjax.options.supervised import SFTConfig


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n')
    return str(path)


def parse(data, *overrides):
    base = ["model.path=m", f"dataset.train_path={data}", f"dataset.valid_path={data}", "eval_freq_epochs=1"]
    return resolve_names(parse_overrides(SFTConfig, [*base, *overrides]), "sft")


def test_a_sound_config_passes(data):
    for overrides in (
        [],
        ["allocation_mode=pipe_data"],
        ["allocation_mode=m2p2d2"],
        ["allocation_mode=manual", "allocation.parallel.model_parallel_size=8"],
        ["allocation_mode=manual", "n_gpus_per_node=1"],
        ["n_nodes=2", "n_gpus_per_node=2"],
        ["dataset.valid_path=null", "eval_freq_epochs=null"],
        ["experiment_name=with_underscore-and.dot"],
    ):
        config = parse(data, *overrides)
        validate(config)
        check_options(allocation_options(config))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["experiment_name=a/b"], "^experiment_name: found 'a/b'"),
        (["trial_name="], "^trial_name: found ''"),
        (["trial_name=a b"], "^trial_name: found 'a b'"),
        (["trial_name=.."], r"^trial_name: found '\.\.'"),
        (["model.path="], "^model.path: nothing given"),
        (["dataset.train_path="], "^dataset.train_path: nothing given"),
        (
            ["dataset.train_path=/no/such.jsonl"],
            "^dataset.train_path: '/no/such.jsonl' does not exist",
        ),
        (
            ["dataset.valid_path=/no/such.jsonl"],
            "^dataset.valid_path: '/no/such.jsonl' does not exist",
        ),
        (
            [f"dataset.train_path={Path(__file__).parent}"],
            "^dataset.train_path: '.*' is a directory without data files",
        ),
        (["dataset.valid_path=null"], r"^dataset.valid_path: nothing given, but eval_freq_\*"),
    ],
)
def test_what_cannot_run_is_refused(data, overrides, message):
    with pytest.raises(ValueError, match=message):
        validate(parse(data, *overrides))


@pytest.mark.parametrize(
    ("given", "sets"),
    [
        ("null", {}),
        ("a.jsonl", {"": "a.jsonl"}),
        ("[one=a.jsonl]", {"one": "a.jsonl"}),
        ("[x/a.jsonl,code=b.json]", {"a": "x/a.jsonl", "code": "b.json"}),
        ("x/a=b/c.jsonl", {"": "x/a=b/c.jsonl"}),
    ],
)
def test_held_out_sets_have_names(given, sets):
    dataset = parse_overrides(SFTConfig, [f"dataset.valid_path={given}"]).dataset
    assert name_sets(dataset.valid_path, "dataset.valid_path") == sets


def test_two_held_out_sets_of_one_name_or_one_that_is_not_there_are_refused(data, tmp_path):
    with pytest.raises(ValueError, match="^dataset.valid_path: found two sets called 'data'; give them names"):
        validate(parse(data, f"dataset.valid_path=[{data},{data}]"))
    with pytest.raises(ValueError, match="^dataset.valid_path: '/no/such.jsonl' does not exist"):
        validate(parse(data, f"dataset.valid_path=[a={data},b=/no/such.jsonl]"))


def test_names_are_filled_in_only_where_they_are_null(tmp_path, monkeypatch):
    monkeypatch.setenv("REALJAX_FILEROOT", str(tmp_path))
    filled = resolve_names(SFTConfig(), "sft")
    assert filled.experiment_name == "quickstart-sft"
    assert filled.fileroot == str(tmp_path)
    assert filled.trial_name.startswith("run20") and filled.trial_name.count("-") == 5
    given = dataclasses.replace(SFTConfig(), experiment_name="e", trial_name="t", fileroot=str(tmp_path / "other"))
    assert resolve_names(given, "sft") == given


def test_fileroot_is_the_option_then_the_variable_then_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REALJAX_FILEROOT", str(tmp_path / "variable"))
    assert find_fileroot(str(tmp_path / "option")) == tmp_path / "option"
    assert find_fileroot(None) == tmp_path / "variable"
    monkeypatch.delenv("REALJAX_FILEROOT")
    assert find_fileroot(None) == Path.home() / ".cache/realjax"


def test_runs_of_different_names_share_no_directory(tmp_path):
    def paths(trial):
        return run_paths(SFTConfig(fileroot=str(tmp_path), experiment_name="e", trial_name=trial))

    one, other = paths("one"), paths("other")
    assert one.logs.relative_to(tmp_path / "logs").parts[1:] == ("e", "one")
    assert len({one.logs, one.checkpoints, one.recover, other.logs, other.checkpoints, other.recover}) == 6
    assert one.compilation_cache == other.compilation_cache


@pytest.mark.parametrize("name", ["../../..", "..", "a/b", "", "\x1b[2J", "x" * 201])
def test_a_user_name_from_the_environment_does_not_lead_out_of_fileroot(name, tmp_path, monkeypatch):
    config = resolve_names(parse_overrides(SFTConfig, [f"fileroot={tmp_path}"]), "sft")
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("LOGNAME", name)
    if name == "":  # as if there were none
        assert run_paths(config).logs.is_relative_to(tmp_path)
        return
    with pytest.raises(
        ValueError, match=r"^user name \(LOGNAME, USER, LNAME or USERNAME\): found .* names a directory"
    ):
        run_paths(config)


def test_an_unwritable_fileroot_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    paths = run_paths(SFTConfig(fileroot=str(tmp_path / "file"), experiment_name="e", trial_name="t"))
    with pytest.raises(ValueError, match="^fileroot: cannot write to"):
        check_writable(paths)
    good = run_paths(SFTConfig(fileroot=str(tmp_path), experiment_name="e", trial_name="t"))
    check_writable(good)
    assert list(good.logs.iterdir()) == []


def test_notices_name_what_is_done_otherwise(data):
    assert list_notices(parse(data)) == []
    (offload,) = list_notices(parse(data, "model.offload=True", "model.optimizer.offload=True"))
    assert offload.startswith("model.optimizer.offload has no effect")
    (fp16,) = list_notices(parse(data, "model.enable_fp16=True"))
    assert fp16.startswith("model.enable_fp16: computing in bfloat16")
