"""Runs that end before their last step."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from realjax.runtime.executor import StepResult
from realjax.runtime.session import Session


@contextmanager
def stopped_after(step: int) -> Iterator[None]:
    """While entered, a run of this process gets SIGTERM in this step: it saves, and ends with the code 143."""
    record = Session.record

    def record_and_stop(session: Session, index: int, result: StepResult):
        position = record(session, index, result)
        if index + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return position

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "record", record_and_stop)
        yield
