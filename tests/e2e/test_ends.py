"""Commands that Ctrl-C or a full disk ends, in processes of their own: a code and no traceback."""

import signal
import time

import pytest

from tests.given.commands import Trial
from tests.given.processes import ROOT, start_process

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
OPTIONS = {
    "allocation_mode": "manual",
    "n_gpus_per_node": 2,
    "allocation.parallel.data_parallel_size": 2,
    "dataset.train_bs_n_seqs": 48,
    "total_train_epochs": 1000,
    "save_freq_steps": 500,
}
# Files of more bytes than this are refused: by the size of one, as a full disk refuses all.
LIMITED = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.path.insert(0, {str(ROOT)!r})
from realjax.apps.command import main
sys.argv.insert(1, "sft")
main()
"""


def wait_for_text(text: str, process, log) -> None:
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.01)


def test_ctrl_c_finishes_the_step_and_saves_and_a_second_one_does_not_wait(given, tmp_path):
    trial, log = Trial(given=given, root=tmp_path, options=OPTIONS | {"recover_mode": "auto"}), tmp_path / "trial.log"
    process = trial.start()
    wait_for_text("(global step 3):", process, log)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130, log.read_text()
    step = int(log.read_text().rpartition("stopped by SIGINT after step ")[2].split(";")[0])
    assert (trial.folder("recover") / str(step)).is_dir() and trial.steps() == list(range(1, step + 1))
    process = trial.start(save_freq_steps=1)
    wait_for_text(f"(global step {step + 3}):", process, log)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.001)  # two that are pending at once are one
    assert process.wait() == 130, log.read_text()
    assert "Traceback" not in log.read_text()


def test_ctrl_c_while_importing(tmp_path):
    log = tmp_path / "log"
    process = start_process(["-v", "-m", "realjax.apps.quickstart", "--help"], log)
    wait_for_text("import 'jax", process, log)
    process.send_signal(signal.SIGINT)
    assert process.wait() in (-signal.SIGINT, 130)
    assert "Traceback" not in log.read_text() and "KeyboardInterrupt" not in log.read_text()


def test_a_disk_that_takes_no_more(given, tmp_path):
    trial, log = Trial(given=given, root=tmp_path, options=OPTIONS), tmp_path / "log"
    process = start_process(["-c", LIMITED, *trial.words(save_freq_steps=2)], log)
    assert process.wait() == 1, log.read_text()
    error = log.read_text().splitlines()[-1]
    assert error.startswith(f"realjax: error: {trial.folder('checkpoints')}") and "File too large; nothing was" in error
    assert "Traceback" not in log.read_text()
