from pathlib import Path

import pytest

from tests.given.checkpoints import make_checkpoint, read_tensors
from tests.given.processes import run_workers

WORKER = Path(__file__).with_name("checkpoint_worker.py")


@pytest.mark.slow
@pytest.mark.e2e
def test_two_processes_read_their_own_parts_and_write_one_checkpoint(tmp_path):
    source = make_checkpoint(tmp_path / "hf", "llama", dtype="bfloat16")
    texts = run_workers(WORKER, 2, tmp_path, str(source), str(tmp_path))
    total = sum(len(raw) // 2 for _, _, raw in read_tensors(source).values())
    read = [dict(line.split()[1:] for line in text.splitlines() if line.startswith("read")) for text in texts]
    assert all(int(numbers["all"]) < 0.75 * total for numbers in read)
    assert (int(read[0]["one"]), int(read[1]["one"])) == (0, total)
    assert read_tensors(tmp_path / "all") == read_tensors(tmp_path / "one") == read_tensors(source)
