"""The command tells XLA, CUDA and NCCL their settings before the backend starts, by what accelerator there is."""

import os
from types import SimpleNamespace

import pytest

from realjax.allocation import allocate, settle
from realjax.apps import devices, quickstart
from realjax.launch.accelerators import Accelerator
from realjax.launch.environment import ProcessGroup
from realjax.options.supervised import SFTConfig

AMPERE = Accelerator(name="NVIDIA A100-SXM4-80GB", architecture="ampere")
QUIET = {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}  # set for every run


@pytest.fixture
def environ(monkeypatch):
    """An environment of the test's own, with a GPU's name to be found by the command."""
    environ = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", *QUIET)}
    monkeypatch.setattr(os, "environ", environ)
    monkeypatch.setattr(devices, "find_accelerator", lambda environ: AMPERE)
    return environ


def plan(monkeypatch: pytest.MonkeyPatch, tmp_path, *words: str) -> dict[str, str]:
    """Runs the command with --plan, without models, and returns the environment that its devices were prepared in."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "answer": "b"}\n')
    seen: dict[str, str] = {}
    monkeypatch.setattr(quickstart, "prepare_devices", lambda *args: seen.update(os.environ))
    monkeypatch.setattr(quickstart.Experiment, "build", lambda self, config: config)
    planned = SimpleNamespace(describe=lambda: "the plan")
    monkeypatch.setattr(settle, "settle_open", lambda spec, devices: spec)
    monkeypatch.setattr(allocate, "allocate", lambda spec, devices: planned)
    paths = [f"fileroot={tmp_path}", "model.path=model", f"dataset.train_path={data}", f"dataset.valid_path={data}"]
    assert quickstart.main(["sft", "--plan", "mode=local", "n_gpus_per_node=8", *paths, *words]) == 0
    return seen


def test_they_are_there_before_the_devices_and_printed_in_a_line(environ, monkeypatch, tmp_path, capsys):
    seen = plan(monkeypatch, tmp_path)
    assert "--xla_disable_hlo_passes=triton-softmax-rewriter" in seen["XLA_FLAGS"]
    assert "deterministic" not in seen["XLA_FLAGS"]
    assert seen["NCCL_LAUNCH_MODE"] == "GROUP"
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "Settings for NVIDIA A100" in line]
    assert "--xla_disable_hlo_passes=triton-softmax-rewriter" in line


def test_an_option_leaves_them_out_and_another_adds_determinism(environ, monkeypatch, tmp_path, capsys):
    before = dict(environ)
    assert plan(monkeypatch, tmp_path, "accelerator_settings=none") == before | QUIET
    assert "Settings" not in capsys.readouterr().out
    seen = plan(monkeypatch, tmp_path, "accelerator_settings=none", "deterministic=True")
    assert seen == before | QUIET | {"XLA_FLAGS": "--xla_gpu_deterministic_ops=true"}


def test_a_contradiction_is_an_error_of_the_users(environ, monkeypatch, tmp_path, capsys):
    environ["XLA_FLAGS"] = "--xla_gpu_deterministic_ops=false"
    with pytest.raises(AssertionError):
        plan(monkeypatch, tmp_path, "deterministic=True")
    assert "realjax: error: deterministic: found True, but XLA_FLAGS has" in capsys.readouterr().err


def test_a_process_of_several_counts_its_own_gpus(environ):
    def prepare(num_processes: int) -> str | None:
        environ.pop("NCCL_LAUNCH_MODE", None)
        group = ProcessGroup(
            coordinator=None, num_processes=num_processes, process_id=0, processes_per_node=num_processes, local_id=0
        )
        devices.prepare_environment(SFTConfig(n_gpus_per_node=8), group)
        return environ.get("NCCL_LAUNCH_MODE")

    assert prepare(8) is None and prepare(2) == "GROUP"


@pytest.mark.parametrize("num_cores", [2, 16])
def test_a_run_on_cpu_devices_sets_nothing_of_an_accelerator(monkeypatch, num_cores):
    """But where each device can have a core, that it keeps to it."""
    before = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", *QUIET)}
    monkeypatch.setattr(os, "environ", dict(before))
    monkeypatch.setattr(devices, "count_cores", lambda: num_cores)
    assert devices.prepare_environment(SFTConfig(deterministic=True, n_gpus_per_node=8), None) == ()
    flags = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"} if num_cores == 2 else {}
    assert os.environ == before | QUIET | flags
