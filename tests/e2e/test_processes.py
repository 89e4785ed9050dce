"""A run in several processes: the numbers of one process, one record, and an end in bounded time when one fails."""

import os
import re
import signal
import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from realjax.launch.environment import HEARTBEAT_SECONDS
from realjax.runtime.stop import STOPS
from tests.given.commands import Given, Trial, stopped_after
from tests.given.compare import relative_errors, without_clocks
from tests.given.launched import started, wait_for_end, wait_for_text, workers_of
from tests.given.processes import HANG_SECONDS
from tests.given.texts import write_pairs

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
STEPS = 4  # 520 rows, 130 at a time
OPTIONS = {
    "allocation_mode": "manual",
    "n_gpus_per_node": 8,
    "allocation.parallel.pipeline_parallel_size": 2,
    "allocation.parallel.model_parallel_size": 2,
    "allocation.parallel.data_parallel_size": 2,
    "dataset.train_bs_n_seqs": 130,
    "total_train_epochs": 1,
    "recover_mode": "auto",
}
# For runs of which only the end counts: quick to compile, and too long to finish.
ENDLESS = {
    "allocation_mode": "manual",
    "n_gpus_per_node": 2,
    "allocation.parallel.data_parallel_size": 2,
    "dataset.train_bs_n_seqs": 130,
    "total_train_epochs": 100,
}


def launch_words(words: list[str], *flags: str, experiment: str = "sft") -> list[str]:
    return ["-m", "launch.local", "--processes", "2", *flags, "--", experiment, *words]


def launch(trial: Trial, *flags: str, **changes: Any) -> str:
    """Runs the trial in two processes to its end and returns what it printed."""
    log = trial.root / f"{trial.name}.log"
    with started(launch_words(trial.words(**changes), *flags, experiment=trial.experiment), log) as process:
        assert process.wait(HANG_SECONDS) == 0, log.read_text()
    return log.read_text()


def assert_same_metrics(found: list[dict], expected: list[dict]) -> None:
    """Fails unless both have the same records, their numbers equal to 1e-5; how long it took is left out."""
    close = partial(pytest.approx, rel=1e-5, abs=1e-5)
    found, expected = without_clocks(found), without_clocks(expected)
    assert [list(record) for record in found] == [list(record) for record in expected]
    for ours, theirs in zip(found, expected):
        assert ours == {name: x if isinstance(x, str) else close(x) for name, x in theirs.items()}


def assert_same_arrays(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    moving = {name: array for name, array in expected.items() if np.linalg.norm(array) > 0}
    errors = relative_errors({name: found[name] for name in moving}, moving)
    assert found.keys() == expected.keys() and max(errors.values()) <= 1e-5, errors


@pytest.fixture(scope="module")
def whole(given: Given, tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """The run in one process of eight devices."""
    root = tmp_path_factory.mktemp("processes")
    options = OPTIONS | {"dataset.valid_path": given.valid, "eval_freq_epochs": 1}
    trial = Trial(given=given, root=root, name="whole", options=options)
    assert trial.run() == 0
    return trial


def test_two_processes_do_what_one_does(whole):
    trial = replace(whole, name="both")
    output = launch(trial, "--devices", "4")
    assert all(re.match(r"\[(0|1|0-1)\] ", line) for line in output.splitlines())
    assert "2 processes joined" in output
    # One record, one checkpoint, one training state; a log of each process.
    assert len(re.findall(r"\(global step \d\):", output)) == STEPS
    assert trial.steps() == list(range(1, STEPS + 1))
    assert [path.name for path in trial.folder("recover").iterdir()] == [str(STEPS)]
    (saved,) = (trial.folder("checkpoints") / "default").iterdir()
    assert saved.name.endswith(f"globalstep{STEPS}")
    for name in ("run.log", "run.1.log", "report.html", "timeline.png"):
        assert (trial.folder("logs") / name).exists()
    assert_same_metrics(trial.metrics(), whole.metrics())
    assert_same_arrays(trial.weights(STEPS), whole.weights(STEPS))
    assert_same_arrays(trial.state(STEPS), whole.state(STEPS))


def test_processes_search_for_one_plan(whole):
    """The first one's: a search of its own in each could differ."""
    options = {k: v for k, v in whole.options.items() if ".parallel." not in k}
    searched = replace(whole, name="searched", options=options | {"allocation_mode": "search", "n_gpus_per_node": 2})
    launch(searched)
    found = [[line["loss"] for line in trial.metrics("train")] for trial in (searched, whole)]
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_two_processes_continue_what_one_began(whole):
    trial = replace(whole, name="moved")
    with stopped_after(2):
        assert trial.run() == 143
    assert trial.steps() == [1, 2]
    output = launch(trial)
    assert f"continuing after step 2, saved in {trial.folder('recover')}" in output
    assert_same_metrics(trial.metrics(), whole.metrics())
    assert_same_arrays(trial.weights(STEPS), whole.weights(STEPS))
    assert_same_arrays(trial.state(STEPS), whole.state(STEPS))


@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_end_when_one_is_killed(victim, given, tmp_path):
    trial, log = Trial(given=given, root=tmp_path, options=ENDLESS), tmp_path / "log"
    with started(launch_words(trial.words()), log) as launcher:
        wait_for_text("(global step 3):", launcher, log)
        workers_of(launcher)[victim].kill()
        assert wait_for_end(launcher, log) == 128 + signal.SIGKILL, log.read_text()
    assert "launch: a process ended with code 137, so the others are ended too" in log.read_text()
    assert "Traceback" not in log.read_text() and "***" not in log.read_text()


def test_a_stopped_process_is_noticed_and_told_in_a_line(given, tmp_path):
    """After a time without a word from it, here shorter than a run's own."""
    assert 15 < HEARTBEAT_SECONDS < 60
    trial, log = Trial(given=given, root=tmp_path, options=ENDLESS), tmp_path / "log"
    sooner = "from realjax.launch import environment; environment.HEARTBEAT_SECONDS = 15"
    with started(["-c", LAUNCHER % sooner, *trial.words()], log) as launcher:
        wait_for_text("(global step 3):", launcher, log)
        workers_of(launcher)[1].suspend()
        assert wait_for_end(launcher, log) not in (0, *(128 + number for number in STOPS)), log.read_text()
    after = log.read_text().rpartition("global step")[2].splitlines()[1:]
    assert len(after) == 2, after
    assert after[after[0].startswith("launch: ")].startswith("[0] realjax: error: process 1 of the run has not ans")


def test_nothing_outlives_its_launcher(given, tmp_path):
    """Nor where it is killed later: `test_faults.py`."""
    trial, log = Trial(given=given, root=tmp_path, options=ENDLESS), tmp_path / "log"
    with started(launch_words(trial.words()), log) as launcher:
        wait_for_text("2 processes joined", launcher, log)
        launcher.kill()
        started_at = time.monotonic()
        assert wait_for_end(launcher, log) == -signal.SIGKILL
        assert time.monotonic() - started_at < 10


@pytest.mark.parametrize(
    ("moment", "number"),
    [("2 processes joined", signal.SIGTERM), ("(global step 3):", signal.SIGINT)],
    ids=["starting", "training"],
)
def test_a_signal_stops_all_and_saves_what_was_done(moment, number, given, tmp_path):
    trial, log = Trial(given=given, root=tmp_path, options=ENDLESS), tmp_path / "log"
    with started(launch_words(trial.words()), log) as launcher:
        wait_for_text(moment, launcher, log)
        # As a terminal does: to the whole group, in which only the launcher may be.
        os.killpg(launcher.pid, number)
        assert wait_for_end(launcher, log) == 128 + number, log.read_text()
    output = log.read_text()
    assert "Traceback" not in output and "[Gloo]" not in output
    if "joined" in moment:
        assert not list(trial.folder("recover").glob("*"))
        return
    (stopped,) = set(re.findall(rf"stopped by {number.name} after step (\d+)", output))
    assert trial.steps() == list(range(1, int(stopped) + 1))
    assert [path.name for path in trial.folder("recover").iterdir()] == [stopped]


def test_an_error_of_all_is_a_line_of_each_and_code_2(given, tmp_path):
    trial, log = Trial(given=given, root=tmp_path, options=ENDLESS), tmp_path / "log"
    with started(launch_words(trial.words(model__path=tmp_path)), log) as launcher:
        wait_for_text("realjax: error", launcher, log)
        assert wait_for_end(launcher, log) == 2, log.read_text()
    assert re.search(r"^\[[\d-]+\] realjax: error: model path '.*' is not a HuggingFace model", log.read_text(), re.M)
    assert "Traceback (most" not in log.read_text()


# Its processes begin with what is put in for `%s`.
LAUNCHER = """
import sys
from realjax.launch.local import Share, run_processes
program = '''
import os, sys
from realjax.apps.quickstart import main
from realjax.data.loader import Loader
%s
sys.exit(main(["sft", *sys.argv[1:]]))
'''
sys.exit(run_processes([sys.executable, "-c", program, *sys.argv[1:]], Share(processes=2)))
"""
# Process 1 goes its own way.
ONE_DIFFERS = (
    LAUNCHER
    % """if os.environ["REALJAX_PROCESS_ID"] == "1":
    %s"""
)
FAILURES = {
    "before the first step": (
        "sys.argv += ['dataset.train_path=none.jsonl']",
        "realjax: error: dataset.train_path: 'none.jsonl' does not exist",
        2,
    ),
    "between steps": (
        "Loader.batch = lambda self, i, load=Loader.batch: load(self, i) if i < 3 else 1 / 0",
        "ZeroDivisionError: division by zero",
        1,
    ),
}


@pytest.mark.parametrize("moment", FAILURES)
def test_an_error_of_one_ends_all(moment, given, tmp_path):
    difference, message, code = FAILURES[moment]
    trial, log = Trial(given=given, root=tmp_path, options=ENDLESS), tmp_path / "log"
    # A save of the step before is under way.
    with started(["-c", ONE_DIFFERS % difference, *trial.words(save_freq_steps=3)], log) as launcher:
        wait_for_text(f"[1] {message}", launcher, log)
        assert wait_for_end(launcher, log) == code, log.read_text()
    assert f"launch: a process ended with code {code}, so the others are ended too" in log.read_text()


APART = {
    "allocation_mode": "manual",
    "n_gpus_per_node": 4,
    "actor_train.parallel.data_parallel_size": 2,
    "actor_train.device_mesh": "NODE01:2,3",
    "ref_inf.parallel.model_parallel_size": 2,
    "ref_inf.device_mesh": "NODE01:0,1",
    "dataset.train_bs_n_seqs": 16,
    "dataset.max_pairs_per_prompt": 1,
    # Each epoch is a whole number of batches, so that a run of one may go on with a second.
    "total_train_epochs": 2,
    "recover_mode": "auto",
}


def test_calls_of_different_processes_give_what_one_process_gives(given, tmp_path):
    """The reference's call runs on the first half of four devices, training on the other."""
    options = APART | {"dataset.train_path": write_pairs(tmp_path / "pairs.jsonl", 48, seed=3)}
    alone = Trial(given=given, root=tmp_path, name="alone", experiment="dpo", options=options)
    assert alone.run() == 0
    steps = alone.steps()
    apart = replace(alone, name="apart")
    # The trained state lives in process 1, the record of the run is kept by process 0; saved, and taken up again.
    launch(apart, total_train_epochs=1, lr_schedule_epochs=2)
    launch(apart, lr_schedule_epochs=2)
    assert apart.steps() == steps and len(steps) > 2
    # Before the first update all margins are 0 but for rounding, and `acc` counts their signs.
    # What a program takes of the memory depends on how far it was optimised, which these are not.
    compared = lambda record: {k: v for k, v in record.items() if k != "acc" and not k.startswith("memory_mib/")}
    found, expected = ([compared(record) for record in trial.metrics()] for trial in (apart, alone))
    assert_same_metrics(found, expected)
    assert_same_arrays(apart.weights(steps[-1], "actor"), alone.weights(steps[-1], "actor"))
    for record in apart.metrics()[2:]:
        # Measured where the call ran: elsewhere it would seem to take no time.
        assert record["time/actor_train"] > 0.1 * record["seconds"]
