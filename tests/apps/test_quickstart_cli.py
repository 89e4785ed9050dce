"""The command line from arguments to the run, with the run itself replaced."""

import sys
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from realjax.apps import devices, log, quickstart, recipe
from realjax.apps.errors import report_errors
from realjax.options.fields import list_options
from tests.options.test_config_dict import RECIPE
from tests.options.test_parsing import QUICKSTART_SFT

# ml_collections 1.1 loads recipes by a method that Python is giving up.
pytestmark = pytest.mark.filterwarnings(r"ignore:the load_module\(\) method is deprecated:DeprecationWarning")


@pytest.fixture
def runs(monkeypatch):
    """The (config, devices) of each run that was started; nothing runs and no device is touched."""
    started = []
    monkeypatch.setitem(
        sys.modules,
        "realjax.experiments.sft",
        SimpleNamespace(build=lambda config: SimpleNamespace(config=config)),
    )
    monkeypatch.setitem(
        sys.modules, "realjax.runtime.loop", SimpleNamespace(run=lambda spec, plan, *more: started.append(plan) or 0)
    )
    plan = lambda spec, devices: SimpleNamespace(config=spec.config, devices=devices)
    monkeypatch.setattr("realjax.allocation.allocate.allocate", plan)
    monkeypatch.setattr("realjax.allocation.settle.settle_open", lambda spec, devices: spec)
    nothing_to_check = SimpleNamespace(check_run=lambda spec: None)
    monkeypatch.setitem(sys.modules, "realjax.experiments.checks", nothing_to_check)
    # `from realjax.runtime import loop` reads the package's attribute when an earlier test imported the real one.
    monkeypatch.setattr("realjax.runtime.loop", sys.modules["realjax.runtime.loop"], raising=False)
    monkeypatch.setattr(quickstart, "prepare_devices", lambda *args: args)
    monkeypatch.setattr("realjax.apps.checkup.warn_before_run", lambda spec: None)
    monkeypatch.delenv("REALJAX_TRACEBACK", raising=False)
    return started


@pytest.fixture
def command(tmp_path):
    """The quickstart's words with paths that exist."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "answer": "b"}\n')
    words = [f"{w.split('=')[0]}={data}" if w.startswith("dataset.") and "path" in w else w for w in QUICKSTART_SFT]
    return [*words, f"fileroot={tmp_path / 'root'}"]


def test_the_quickstart_command_starts_a_run(runs, command, tmp_path, capsys):
    assert quickstart.main(["sft", *command]) == 0
    (spec,) = runs
    assert spec.config.dataset.train_bs_n_seqs == 512
    assert spec.devices[:2] == (1, 8)
    lines = capsys.readouterr().out.splitlines()
    stamp, text = lines[0].split(" ", 1)
    assert text == "quickstart INFO: Running sft experiment."
    date, clock = stamp.split("-")
    assert len(date) == 8 and len(clock) == len("03:10:56.216")
    logs, checkpoints = (line.split(" quickstart INFO: ")[1] for line in lines[1:3])
    root = tmp_path / "root"
    assert logs.startswith(f"Logs will be dumped to {root}/logs/") and logs.endswith("/quickstart-sft/release")
    assert checkpoints.startswith(f"Model checkpoints will be saved to {root}/checkpoints/")
    assert len(lines) == 3


def test_the_recipe_starts_the_same_run(runs, command):
    flags = [f"--config.{word}" for word in command if "path" in word or "root" in word]
    assert quickstart.main(["sft", *command]) == 0
    assert recipe.main(["launch", f"--config={RECIPE}", *flags]) == 0
    assert runs[0] == runs[1]


def test_another_command_gets_its_words_and_stands_in_the_help(monkeypatch, capsys):
    given = []
    monkeypatch.setitem(sys.modules, "other_command", SimpleNamespace(main=lambda words: given.append(words) or 3))
    other = quickstart.Command(module="other_command", summary="does something else")
    monkeypatch.setitem(quickstart.COMMANDS, "other", other)
    assert quickstart.main(["other", "a=1", "--b"]) == 3
    assert given == [["a=1", "--b"]]
    assert quickstart.main(["--help"]) == 0
    assert "other        does something else" in capsys.readouterr().out
    assert quickstart.main(["othr"]) == 2
    assert "did you mean other?" in capsys.readouterr().err


def test_help_lists_experiments_and_options(capsys):
    assert quickstart.main(["--help"]) == 0
    listed = capsys.readouterr().out
    for name, experiment in quickstart.EXPERIMENTS.items():
        assert f"{name} " in listed and experiment.summary in listed
        assert quickstart.main([name, "--help", "all"]) == 0
        text = capsys.readouterr().out
        assert all(option.path in text for option in list_options(experiment.config_cls))
    assert quickstart.main([]) == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["stf"], "unknown experiment 'stf': .*did you mean sft?"),
        (["sft", "modle.path=x"], "unknown option modle.path"),
        (["sft", "n_nodes=0"], "n_nodes: found 0; it must be at least 1"),
        (["sft", "model.path=x"], "dataset.train_path: nothing given"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(args, message, runs, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("REALJAX_FILEROOT", str(tmp_path))
    assert quickstart.main(args) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("realjax: error: ") and captured.err.count("\n") == 1
    assert message.split(": .*")[0] in captured.err
    assert "Running" not in captured.out
    assert runs == []


def test_tracebacks_on_request_and_other_exceptions_always(monkeypatch):
    with pytest.raises(KeyError), report_errors():
        raise KeyError("bug")
    monkeypatch.setenv("REALJAX_TRACEBACK", "1")
    with pytest.raises(ValueError, match="shown"), report_errors():
        raise ValueError("shown")


def test_an_unwritable_fileroot_stops_before_the_run(runs, command, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert quickstart.main(["sft", *command, f"fileroot={tmp_path / 'file'}"]) == 2
    assert "fileroot: cannot write to" in capsys.readouterr().err
    assert runs == []


@pytest.mark.parametrize("mode", ["slurm", "ray"])
def test_an_absent_launcher_means_this_process(mode, runs, command, capsys, monkeypatch):
    monkeypatch.setitem(quickstart.IS_USABLE, mode, lambda: False)
    assert quickstart.main(["sft", *command, f"mode={mode}"]) == 0
    assert f"quickstart WARNING: mode={mode}: no such cluster" in capsys.readouterr().out
    assert len(runs) == 1


def test_a_present_cluster_is_given_the_command(runs, command, monkeypatch):
    given = []
    monkeypatch.setitem(quickstart.IS_USABLE, "slurm", lambda: True)
    monkeypatch.setattr("realjax.apps.launcher.main", lambda words: given.append(words) or 0)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    words = ["sft", *command, "mode=slurm"]
    assert quickstart.main(words) == 0
    assert given == [["slurm", *words]] and not runs
    # In a job, with a launcher's processes, and for a plan, it is this process that is meant.
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert quickstart.main(words) == 0
    assert len(given) == len(runs) == 1


def test_options_without_effect_say_so_on_the_console(runs, command, capsys):
    assert quickstart.main(["sft", *command, "model.backend=megatron", "model.enable_fp16=True"]) == 0
    out = capsys.readouterr().out
    assert "options INFO: model.backend has no effect here" in out
    assert "model.enable_fp16: computing in bfloat16" in out


def test_logging_is_set_up_once(capsys):
    log.configure_logging()
    log.configure_logging()
    quickstart.logger.info("one [line]")
    assert capsys.readouterr().out.count("one [line]") == 1


@pytest.fixture
def jax_settings():
    settings: Any = jax.config
    kept = settings.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", kept)


def test_virtual_cpu_devices_stand_in(jax_settings, tmp_path, capsys):
    log.configure_logging()
    prepared = devices.prepare_devices(2, 4, tmp_path)
    assert len(set(prepared)) == 8
    assert prepared[0].platform == "cpu"
    assert "No accelerator found: 8 virtual CPU devices stand in." in capsys.readouterr().out
    assert devices.prepare_devices(1, 2, tmp_path) == prepared[:2]


def test_too_few_accelerators_are_refused(jax_settings, tmp_path, monkeypatch):
    monkeypatch.setattr(devices.jax, "devices", lambda: ["gpu0"])
    monkeypatch.setattr(devices.jax, "default_backend", lambda: "gpu")
    with pytest.raises(ValueError, match=r"^n_nodes\*n_gpus_per_node: 1\*8 = 8 devices wanted, but .* has 1 \(gpu\)"):
        devices.prepare_devices(1, 8, tmp_path)


def test_more_devices_than_a_process_can_have_are_refused_before_there_are_any():
    with pytest.raises(ValueError, match=r"^n_nodes\*n_gpus_per_node: found 409600 devices for one process, which has"):
        devices.check_num_devices(409_600)
    devices.check_num_devices(1024)
