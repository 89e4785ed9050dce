"""The launcher: what it starts ends with it, a second signal is final, a run that failed is started again."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from realjax.launch import restarts
from realjax.launch.local import DEFAULT_GPUS_PER_NODE, STOPS, Running, main, run_again
from realjax.launch.restarts import DEFAULT_RETRIES, count_retries, find_word, is_retried, pause_seconds
from realjax.options.common import CommonExperimentConfig
from tests.given.processes import HANG_SECONDS, ROOT

# A launcher of processes that run a piece of Python, without any of realjax in them.
LAUNCHER = """
import sys
from realjax.launch import local, restarts
restarts.FIRST_PAUSE_SECONDS = 0.1
command = [sys.executable, "-c", sys.argv[1]]
sys.exit(local.run_processes(command, local.Share(processes=int(sys.argv[2])), num_retries=int(sys.argv[3])))
"""
NUMBER = 'import os, signal, sys, time; i = os.environ["REALJAX_PROCESS_ID"]\n'
DEAF = NUMBER + "for n in (2, 15): signal.signal(n, signal.SIG_IGN)\nprint('ready', i, flush=True)\ntime.sleep(1e4)"


@contextmanager
def launched(code: str, log: Path, num_processes: int = 2, num_retries: int = 0) -> Iterator[subprocess.Popen]:
    with log.open("w") as file:
        command = [sys.executable, "-c", LAUNCHER, code, str(num_processes), str(num_retries)]
        launcher = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, process_group=0)
    try:
        yield launcher
    finally:
        launcher.kill()
        launcher.wait()


def run(code: str, log: Path, num_processes: int = 2, num_retries: int = 0) -> tuple[int, str]:
    with launched(code, log, num_processes, num_retries) as launcher:
        return launcher.wait(HANG_SECONDS), log.read_text()


def wait_for(log: Path, *texts: str) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not all(text in log.read_text() for text in texts):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


@pytest.mark.parametrize("is_stopped", [False, True], ids=["running", "stopped"])
def test_no_worker_outlives_a_killed_launcher(is_stopped, tmp_path):
    log = tmp_path / "log"
    with launched(DEAF, log) as launcher:
        wait_for(log, "ready 0", "ready 1")
        workers = psutil.Process(launcher.pid).children()
        for worker in workers if is_stopped else ():
            worker.suspend()
        launcher.kill()
        gone, left = psutil.wait_procs(workers, timeout=10)
    assert len(gone) == 2 and not left


def test_a_second_signal_is_final(tmp_path):
    """As a terminal sends it: to the whole group, in which only the launcher may be."""
    log = tmp_path / "log"
    with launched(DEAF, log, num_processes=16, num_retries=3) as launcher:
        wait_for(log, *(f"ready {i}\n" for i in range(16)))
        workers = psutil.Process(launcher.pid).children()
        for _ in range(2):
            os.killpg(launcher.pid, signal.SIGINT)
            time.sleep(0.2)
        started_at = time.monotonic()
        assert launcher.wait(HANG_SECONDS) == 128 + signal.SIGINT
        assert time.monotonic() - started_at < 10
        assert len(workers) == 16 and not [worker for worker in workers if worker.is_running()]
    assert len(log.read_text().splitlines()) == 16, log.read_text()  # what they said, and no more


def test_signals_go_afterwards_where_they_went_before():
    find = lambda: [signal.getsignal(number) for number in STOPS]
    before, within = find(), []

    def run_fn(running: Running) -> int:
        within.extend(handler == running.forward for handler in find())
        raise ValueError("no room")  # as a launcher does, past all restarts

    with pytest.raises(ValueError, match="no room"):
        run_again(run_fn, 0)
    assert within == [True, True] and find() == before


def test_what_sixteen_say_alike_is_a_line(tmp_path):
    code, text = run("print('alike')", tmp_path / "log", num_processes=16)
    # As many copies as moments, and each process once.
    prefixes = re.findall(r"^\[([\d,-]+)\] alike$", text, re.M)
    ranges = [part.split("-") for prefix in prefixes for part in prefix.split(",")]
    assert code == 0 and sum(int(ends[-1]) - int(ends[0]) + 1 for ends in ranges) == 16
    assert len(prefixes) < 16, text


FAILS_ONCE = "from pathlib import Path\nif i == '1' and not Path({0!r}).exists(): Path({0!r}).touch(); sys.exit(75)"


def test_a_run_that_failed_is_started_again(tmp_path):
    program = NUMBER + FAILS_ONCE.format(str(tmp_path / "once")) + "\nprint('done', i)"
    code, text = run(program, tmp_path / "log", num_retries=1)
    assert code == 0 and "started again in 0 s (1 of 1 times)" in text
    assert text.count("done 1") == 1


@pytest.mark.parametrize(("wanted", "num_retries", "times"), [(75, 2, 3), (2, 2, 1), (1, 0, 1)])
def test_it_is_started_so_many_times_and_not_where_that_is_of_no_use(wanted, num_retries, times, tmp_path):
    code, text = run(NUMBER + f"print('begins', flush=True); sys.exit({wanted})", tmp_path / "log", 1, num_retries)
    assert (code, text.count("begins")) == (wanted, times)


def test_only_a_run_that_goes_on_is_tried_again():
    assert count_retries(["sft"]) == count_retries(["sft", "recover_mode=save"]) == 0
    assert count_retries(["sft", "recover_mode=auto"]) == DEFAULT_RETRIES == CommonExperimentConfig().recover_retries
    assert count_retries(["sft", "recover_mode=auto", "recover_retries=3", "recover_retries=7"]) == 7
    with pytest.raises(ValueError, match="^recover_retries: found 'x'"):
        count_retries(["recover_mode=auto", "recover_retries=x"])


def test_codes_that_are_final():
    assert [code for code in (0, 1, 2, 75, 130, 134, 137, 143) if is_retried(code)] == [1, 75, 134, 137]


def test_pauses_grow_and_end():
    assert [pause_seconds(n) for n in (1, 2, 3, 9)] == [5, 10, 20, restarts.LONGEST_PAUSE_SECONDS]


def test_the_last_word_counts():
    assert find_word(["a=1", "a.b=2", "a=3=4"], "a") == "3=4" and find_word(["a.b=2"], "a") is None


def test_one_process_per_device_is_an_option(monkeypatch):
    seen = []
    monkeypatch.setattr("realjax.launch.local.run_processes", lambda *given: seen.append(given) or 0)
    assert main(["--per-device", "--", "sft", "n_gpus_per_node=4"]) == main(["--per-device", "--", "sft"]) == 0
    assert [share.processes for _, share, _ in seen] == [4, DEFAULT_GPUS_PER_NODE]
