"""Runs that hang end: who waits for whom, processes in different calls, and the run that goes on from its save."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from realjax.core.exit_codes import STALLED
from realjax.core.progress import Mark
from realjax.runtime.watchdog import (
    FOLDER,
    STACKS,
    VERDICT,
    Position,
    describe_difference,
    describe_stall,
    is_at_work,
    read_position,
)
from tests.given.processes import HANG_SECONDS, ROOT


def position(*calls: str, first: int = 0, **changes: object) -> Position:
    marks = tuple(Mark(number=first + i, what=call, step=4) for i, call in enumerate(calls))
    return Position(**{"turn": 1, "recent": marks, "seconds": 7.0, **changes})


def test_processes_in_different_calls_are_told():
    same = {0: position("a", "b"), 1: position("a", "b", "c"), 2: position("b", "c", first=1)}
    assert describe_difference(same) is None and describe_difference({}) is None
    line = describe_difference(same | {3: position("a", "c")})
    assert line == "processes are in different calls: process 3 in c of step 5, process 0 in b of step 5"


def test_those_behind_are_waited_for():
    ahead = position("a", "b", "c")
    line = describe_stall({0: ahead, 1: position("a", "b"), 2: ahead, 3: ahead})
    assert line == "process 1 is in b of step 5 (for 7 s), processes 0,2-3 wait in c of step 5"


def test_one_that_does_not_answer_is_waited_for_wherever_it_is():
    where = position("a", "b", pending=("actor_train",))
    line = describe_stall({0: where, 1: where}, {1})
    assert line.startswith("process 1 does not answer since b of step 5 (for 7 s, waiting for actor_train")
    assert line.endswith("process 0 waits in b of step 5")


def test_all_in_one_call_is_said_once():
    where = position("a", compiling="actor_train")
    line = describe_stall(dict.fromkeys(range(8), where))
    assert line == "all 8 processes are in a of step 5 (for 7 s, compiling actor_train)"


def test_one_that_makes_the_tokens_is_not_given_up_by_those_who_wait():
    waiting, working = (position("data", seconds=seconds, bound=60.0, is_busy=True) for seconds in (90.0, 0.0))
    assert is_at_work(waiting.mark, [waiting, working]) and not is_at_work(waiting.mark, [waiting, waiting])
    assert not is_at_work(waiting.mark, [position("data", "checks", seconds=0.0, bound=60.0, is_busy=True)])


def test_one_that_compiles_is_not_given_up_by_those_who_wait():
    waiting = position("actor_train", "results", seconds=90.0, bound=60.0)
    compiling = position("actor_train", seconds=90.0, bound=720.0, compiling="actor_train")
    assert is_at_work(waiting.mark, [waiting, compiling])
    assert not is_at_work(waiting.mark, [waiting, replace(compiling, seconds=720.0)])
    assert not is_at_work(waiting.mark, [waiting, replace(compiling, compiling=None)])


def test_half_a_file_is_none(tmp_path):
    path = tmp_path / "0.json"
    assert read_position(path) is None
    path.write_text('{"turn": 1, "rec')
    assert read_position(path) is None


HANGS = """
import sys, time
from pathlib import Path
from realjax.runtime.watchdog import Watchdog
with Watchdog(Path(sys.argv[1]), 0.2, 5.0, turn_seconds=0.05) as progress:
    for step in range(3):
        for call in ("rewards", "train"):
            progress.begin(call, step)
    progress.begin("rewards", 3)
    {}
    progress.begin("train", 3)
    time.sleep(0.1)
print("the end")
"""


def run(program: str, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "error", "-c", HANGS.format(program), str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS)


def test_a_process_that_hangs_ends_with_its_stacks_and_a_line(tmp_path):
    found = run("time.sleep(1e4)", tmp_path)
    assert found.returncode == STALLED, found.stderr
    (line,) = found.stderr.splitlines()
    assert line.startswith("no progress for 0 s: process 0 is in rewards of step 4 (for ")
    stacks = (tmp_path / STACKS / "process0.txt").read_text()
    assert 'File "<string>", line 10 in <module>' in stacks
    assert json.loads((tmp_path.with_name(f".{tmp_path.name}.{FOLDER}") / VERDICT).read_text())["process"] == 0


READS = """\
progress.begin("the data", is_busy=True)
    end = time.monotonic() + 0.2 * 12 * 2
    while time.monotonic() < end:
        pass
    print("read", flush=True)
    time.sleep(1e4)
"""


def test_a_start_may_take_any_time_while_it_computes(tmp_path):
    found = run(READS, tmp_path)
    assert (found.returncode, found.stdout) == (STALLED, "read\n"), found.stderr
    assert found.stderr.startswith("no progress for 2 s: process 0 is in the data (for ")


COMPILES = """\
with progress.compile("quick"):
        pass
    with progress.compile("train"):
        time.sleep({seconds})
"""


def test_a_program_may_compile_in_silence_for_its_own_bound(tmp_path):
    """Longer than anything else may take, after one that was quick."""
    found = run(COMPILES.format(seconds=0.2 * 12 * 1.5), tmp_path)
    assert (found.returncode, found.stdout, found.stderr) == (0, "the end\n", "")


def test_a_program_that_compiles_for_ever_ends(tmp_path):
    found = run(COMPILES.format(seconds=1e4), tmp_path)
    assert found.returncode == STALLED
    assert found.stderr.startswith("no progress for 5 s: process 0 is in rewards of step 4 (for "), found.stderr
    assert ", compiling train); the stacks" in found.stderr


def test_one_that_goes_on_does_not(tmp_path):
    found = run("time.sleep(0.1)", tmp_path)
    assert (found.returncode, found.stdout, found.stderr) == (0, "the end\n", "")
    assert not (tmp_path / STACKS).exists()
