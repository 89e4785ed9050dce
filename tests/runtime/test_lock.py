"""One run of a name at a time, whoever else has it is told; a dead holder is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from realjax.runtime.lock import lock_run
from tests.given.processes import ROOT

HOLD = """
import sys
from pathlib import Path
from realjax.runtime.lock import lock_run
with lock_run(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_is_refused_with_the_holders_name_until_the_first_ends(tmp_path):
    logs = tmp_path / "e" / "trial"
    with lock_run(logs), pytest.raises(ValueError, match="trial_name: another run of this name is going on") as caught:
        with lock_run(tmp_path / "e" / "other"):
            pass
        with lock_run(logs):
            pytest.fail("two hold it")
    assert f"process {os.getpid()} on {os.uname().nodename}, since 2" in str(caught.value)
    with lock_run(logs):
        pass
    assert not logs.exists()


@pytest.mark.e2e
def test_a_killed_holder_leaves_the_lock_behind_without_harm(tmp_path):
    logs = tmp_path / "trial"
    command = [sys.executable, "-c", HOLD, str(logs)]
    holder = subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    with holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"process {holder.pid} on"), lock_run(logs):
            pytest.fail("two hold it")
        holder.kill()
        holder.wait()
    assert list(Path(tmp_path).glob(".*lock"))
    with lock_run(logs):
        pass
