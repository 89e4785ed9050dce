"""Checkpoints are written beside the steps, and a state counts when those of its step are there."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from realjax.core.manifest import find_damage
from realjax.dataflow.run import Frequency
from realjax.hf import save as hf_save
from realjax.runtime.background import BackgroundWrites
from realjax.runtime.session import Session, Taken
from tests.given.checkpoints import write_llama
from tests.given.specs import make_paths, make_spec, run_here


def test_steps_go_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_llama(tmp_path / "model")
    spec = make_spec(make_paths(tmp_path), save=Frequency(steps=2), recover_mode="auto")
    write, record, is_released = hf_save.write_tensors, Session.record, threading.Event()
    saved: dict[int, list[str]] = {}

    def write_late(*args, **options):
        assert is_released.wait(60)
        write(*args, **options)

    def record_and_look(session: Session, taken: Taken) -> None:
        saved[taken.step + 1] = sorted(path.name for path in spec.paths.recover.iterdir())
        if taken.step + 1 == 3:
            is_released.set()
        record(session, taken)

    monkeypatch.setattr(hf_save, "write_tensors", write_late)
    monkeypatch.setattr(Session, "record", record_and_look)
    assert run_here(spec) == 0
    # The state of step 2 may be written in step 3, but it has its name only when the checkpoint is there.
    assert not any(name.isdigit() for name in saved[3])
    assert sorted(path.name for path in spec.paths.recover.iterdir()) == ["2", "3"]
    exports = sorted((spec.paths.checkpoints / "default").iterdir())
    assert len(exports) == 2 and [find_damage(path) for path in exports] == [None, None]


@pytest.mark.parametrize("notice", [BackgroundWrites.wait, lambda writes: writes.make_barrier()()])
def test_what_a_write_raised_is_raised_once_more(notice: Callable[[BackgroundWrites], None]):
    def fail() -> None:
        raise OSError("no space left")

    writes = BackgroundWrites()
    writes.begin(fail, 0)
    with pytest.raises(OSError, match="no space left"):
        notice(writes)
    writes.begin(lambda: None, 0)
    writes._pool.shutdown()
