"""A run that a signal or the machine ends, in every phase: a code, one line, and what was done is safe."""

import errno
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import orbax.checkpoint as ocp
import pytest

from realjax.algorithms.sft import SFT_LOSS
from realjax.apps.errors import report_errors
from realjax.dataflow.run import Evaluation, Frequency, RunSpec
from realjax.hf import save as hf_save
from realjax.record import rundir
from realjax.record.metrics import MetricsWriter, TensorBoardFile, read_metrics
from realjax.record.timeline import Timeline
from realjax.runtime import exports, loop, resume, run_report, session
from realjax.runtime.checkpoint import RunCheckpointer
from realjax.runtime.places import Places
from realjax.runtime.run_report import RunReport
from tests.given.checkpoints import write_llama
from tests.given.sequences import make_loader
from tests.given.specs import make_paths, make_spec, run_here

STEPS = 3
FULL = os.strerror(errno.ENOSPC)


@pytest.fixture
def spec(tmp_path: Path) -> Iterator[RunSpec]:
    write_llama(tmp_path / "model")
    held_out = Evaluation(role="default", loss=SFT_LOSS, loader=make_loader(in_order=True))
    every_step = Frequency(steps=1)
    yield make_spec(
        make_paths(tmp_path), evaluations={"": held_out}, evaluate=every_step, save=every_step, recover_mode="auto"
    )


def run_to_end(spec: RunSpec) -> int:
    with report_errors() as end:
        end.code = run_here(spec)
    return end.code


def before(patch: pytest.MonkeyPatch, owner: object, name: str, action: Callable[[], None], call: int = 1) -> None:
    """Has the owner's function do something before its `call`-th call."""
    function, calls = getattr(owner, name), []

    def act_first(*args, **options):
        calls.append(name)
        if len(calls) == call:
            action()
        return function(*args, **options)

    patch.setattr(owner, name, act_first)


def saved_steps(spec: RunSpec) -> list[int]:
    return sorted(int(path.name) for path in spec.paths.recover.iterdir())


# Where a signal comes, and the step after which the run then ends; None: before there was anything to save.
PHASES = {
    "making the directories": (resume, "replace_text", 1, None),
    "loading": (resume, "load_role", 1, None),
    "evaluating before the first step": (session, "evaluate_loss", 1, None),
    "compiling": (session.Session, "begin_step", 1, 1),
    "evaluating": (session, "evaluate_loss", 2, 1),
    "exporting": (exports, "begin_save", 1, 2),
    "saving": (RunCheckpointer, "save", 2, 3),
    "writing the report": (RunReport, "finish", 1, STEPS),
    "closing": (RunCheckpointer, "__exit__", 1, STEPS),
}


@pytest.mark.parametrize(
    ("phase", "number"),
    # What a signal is called matters only to what is said of it.
    [*((phase, signal.SIGINT) for phase in PHASES), ("loading", signal.SIGTERM), ("saving", signal.SIGTERM)],
)
def test_a_signal_in_any_phase(phase, number, spec, monkeypatch, capsys, caplog):
    owner, name, call, step = PHASES[phase]
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO, "realjax"):
        before(patch, owner, name, lambda: os.kill(os.getpid(), number), call)
        code = run_to_end(spec)
    error = capsys.readouterr().err
    if step is None:
        assert code == 128 + number
        assert error == f"realjax: stopped by {number.name} before there was anything to save\n"
    elif step == STEPS:
        assert code == 0  # all was done and written
    else:
        assert code == 128 + number
        assert f"stopped by {number.name} after step {step}; recover_mode=auto continues from here" in caplog.text
        assert f"{number.name}: the run ends after what is under way, saved; once more ends it at once" in caplog.text
    assert step is None or saved_steps(spec)[-1] == step
    assert run_to_end(spec) == 0
    records = [
        record["step"] for record in read_metrics(spec.paths.logs / "metrics.jsonl") if record["kind"] == "train"
    ]
    assert records == list(range(1, STEPS + 1))


def fill() -> None:
    raise OSError(errno.ENOSPC, FULL)


# What cannot be written, in its first call after the first step was saved; and the step that is safe.
WRITES = {
    "metrics": (MetricsWriter, "write", 3, 1),
    "the metrics of a step": (MetricsWriter, "write", 4, 2),
    "TensorBoard": (TensorBoardFile, "write", 4, 2),
    "an export": (hf_save, "write_tensors", 2, 1),
    "its config": (hf_save, "write_config", 2, 1),
    "a directory": (Places, "check", 2, 1),
    "the state": (RunCheckpointer, "save", 2, 1),
    "the state, on its thread": (ocp.StandardCheckpointHandler, "finalize", 2, 1),
    "the graph": (run_report, "draw_graph", 1, STEPS),
    "the timeline": (Timeline, "draw", 1, STEPS),
    "the report": (RunReport, "finish", 1, STEPS),
}


@pytest.mark.parametrize("what", WRITES)
def test_a_full_disk_at_any_write(what, spec, monkeypatch, capsys):
    owner, name, call, step = WRITES[what]
    with monkeypatch.context() as patch:
        before(patch, owner, name, fill, call)
        assert run_to_end(spec) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("realjax: error: ") and FULL in error
    assert f"step {step} is saved in {spec.paths.recover}; once that is mended, the same command" in error
    assert run_to_end(spec) == 0  # once it is


def test_a_full_disk_before_the_first_save(spec, monkeypatch, capsys):
    for owner, name in ((resume, "replace_text"), (loop, "MetricsWriter"), (hf_save, "write_tensors")):
        with monkeypatch.context() as patch:
            before(patch, owner, name, fill)
            assert run_to_end(spec) == 1
        assert capsys.readouterr().err.endswith(
            "; nothing was saved before; give the command again once that is mended\n"
        )


@pytest.mark.parametrize("kind", ["checkpoints", "recover", "logs"])
def test_a_directory_that_is_removed_while_the_run_goes_on(kind, spec, monkeypatch, capsys):
    directory = getattr(spec.paths, kind)
    with monkeypatch.context() as patch:
        before(patch, session.Session, "begin_step", lambda: move_away(directory), 3)
        assert run_to_end(spec) == 1
    check_removed(directory, capsys.readouterr().err)


@pytest.mark.parametrize("is_missed", [False, True])
def test_a_directory_that_is_removed_while_a_save_is_written_there(is_missed, spec, monkeypatch, capsys):
    def remove() -> None:
        move_away(spec.paths.recover)
        if is_missed:
            miss_files()

    with monkeypatch.context() as patch:
        before(patch, ocp.StandardCheckpointHandler, "finalize", remove, 2)
        assert run_to_end(spec) == 1
    check_removed(spec.paths.recover, capsys.readouterr().err)


def test_a_save_that_orbax_refuses_is_no_error_of_the_user(spec, monkeypatch):
    before(monkeypatch, ocp.StandardCheckpointHandler, "finalize", miss_files, 2)
    with pytest.raises(RuntimeError, match=f"{spec.paths.recover}: step 2 could not be saved"):
        run_to_end(spec)


def miss_files() -> None:
    """Raises what Orbax says of files that it wrote a moment ago."""
    raise ValueError("Save failed: 1/40 params are missing .zarray in checkpoint:\nparams.embed.table.")


def move_away(directory: Path) -> None:
    directory.rename(directory.with_name("elsewhere"))


def check_removed(directory: Path, error: str) -> None:
    assert error.count("\n") == 1 and str(directory) in error
    assert "was removed while the run went on" in error or os.strerror(errno.ENOENT) in error


def test_a_log_that_cannot_be_written_is_given_up_with_a_warning(tmp_path, monkeypatch, caplog, capsys):
    with rundir.write_log(tmp_path), caplog.at_level(logging.INFO, "realjax"):
        log = logging.getLogger("realjax.somewhere")
        (handler,) = (each for each in logging.getLogger("realjax").handlers if isinstance(each, rundir.LogFile))
        monkeypatch.setattr(handler.stream, "write", lambda text: fill())
        for text in ("first", "second"):
            log.info(text)
    assert caplog.text.count("run.log cannot be written") == 1 and FULL in caplog.text
    assert "first" in caplog.text and "second" in caplog.text
    assert "Logging error" not in capsys.readouterr().err
