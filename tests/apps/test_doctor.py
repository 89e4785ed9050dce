"""What `realjax doctor` finds: all well here, and each thing that is not, in a line with what helps."""

import re
import shutil
from collections import namedtuple
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from realjax.apps import checkup, quickstart
from realjax.apps.checkup import check_accelerators, check_clocks, check_disk, check_files, check_versions, saved_bytes
from realjax.core.manifest import write_manifest
from tests.given.checkpoints import edit_tensors
from tests.given.runs import build_spec, make_options

Usage = namedtuple("Usage", "total used free")


def test_a_machine_that_is_well(tmp_path, capsys):
    assert quickstart.main(["doctor", f"fileroot={tmp_path}"]) == 0, capsys.readouterr().out
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ok ")]
    assert [line.split()[1] for line in lines] == [
        *("versions:", "accelerators:", "driver:", "all-reduce:", "files:", "disk:", "clocks:"),
    ]
    assert re.search(r"[\d.]+ GB/s over 8 devices", lines[3])
    assert not list(tmp_path.glob(".doctor*"))


def test_a_run_says_how_much_it_will_save(given, tmp_path):
    options = make_options("sft", given, tmp_path, max_recover_saves_to_keep=3)
    spec = build_spec("sft", options)
    (role,) = spec.roles.values()
    size = checkup.count_params(role.config)
    assert saved_bytes(spec) == size * (12 * 4 + 4)
    assert saved_bytes(build_spec("sft", options | {"benchmark_steps": 2})) == 0


def test_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(checkup.shutil, "disk_usage", lambda path: Usage(10, 9, 10**9))
    assert check_disk(tmp_path / "not" / "there", 10**9).is_well
    found = check_disk(tmp_path, 2 * 10**9)
    assert not found.is_well and "1.0 GB free" in str(found) and "2.0 GB needed" in str(found)
    assert "lower max_recover_saves_to_keep" in str(found)


def test_a_directory_that_nobody_can_write_to(tmp_path):
    (tmp_path / "file").write_text("")
    found = check_files(tmp_path / "file")
    assert not found.is_well and "cannot be written by process 0" in found.text and "set fileroot" in found.text


def test_a_directory_of_which_one_machine_has_another(tmp_path, monkeypatch):
    monkeypatch.setattr(checkup, "gather", lambda values: np.stack([np.zeros_like(values), values]))
    monkeypatch.setattr(checkup, "from_first", lambda value: value)
    monkeypatch.setattr(checkup, "SEEN_SECONDS", 0.2)
    monkeypatch.setattr(checkup.jax, "process_count", lambda: 2)
    found = check_files(tmp_path)
    assert not found.is_well and "process 1 misses files" in found.text


def test_a_model_that_is_not_as_it_was_written(given, tmp_path):
    model = shutil.copytree(given.language_model, tmp_path / "model")
    write_manifest(model)
    spec = build_spec("sft", make_options("sft", given, tmp_path, model__path=model))
    assert checkup.check_models(spec) == checkup.Finding(
        name="models", is_well=True, text="1 with checksums are as they were written"
    )
    edit_tensors(model, lambda tensors: {name: tensor * 2 for name, tensor in tensors.items()})
    found = checkup.check_models(spec)
    assert not found.is_well and "'model.safetensors' is not as it was written" in found.text


def test_clocks_apart(monkeypatch):
    monkeypatch.setattr(checkup, "gather", lambda values: np.stack([values, values + 5]))
    found = check_clocks()
    assert not found.is_well and found.text.startswith("5.00 s apart")


def test_devices_of_two_kinds():
    kinds = [SimpleNamespace(device_kind=kind) for kind in ("A", "B", "B")]
    found = check_accelerators(kinds)
    assert not found.is_well and "3 x A, B" in found.text
    assert check_accelerators(jax.devices()).is_well


def test_a_package_that_is_too_old(monkeypatch):
    monkeypatch.setattr(checkup.importlib.metadata, "requires", lambda name: ["jax>=99", "wandb>=99; extra == 'wandb'"])
    found = check_versions()
    assert not found.is_well and "jax" in found.text and "needs >=99" in found.text and "wandb" not in found.text


def test_a_run_warns_of_what_is_found_in_no_time(given, tmp_path, monkeypatch, caplog):
    spec = build_spec("sft", make_options("sft", given, tmp_path))
    checkup.warn_before_run(spec)
    assert not caplog.records
    monkeypatch.setattr(checkup.shutil, "disk_usage", lambda path: Usage(10, 9, 10))
    checkup.warn_before_run(spec)
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["disk"]


@pytest.mark.parametrize("words", [["n_nodes=0"], ["fileroo=x"]])
def test_bad_words_are_told(words, capsys):
    assert quickstart.main(["doctor", *words]) == 2
    assert "realjax: error: " in capsys.readouterr().err
