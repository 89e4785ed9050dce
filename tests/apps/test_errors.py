"""What the exit code of an error is: only what a user has to mend keeps a launcher from another attempt."""

import jax
import pytest

from realjax.apps.errors import judge_error
from realjax.core.exit_codes import FAILED, USER_ERROR
from realjax.core.faults import RunFault

GLOO = "UNKNOWN: Gloo all-reduce failed: [pair.cc:547] Connection closed by peer [127.0.0.1]:11403"
FULL = "RESOURCE_EXHAUSTED: Failed writing: \"/disk/d/bf\": No space left on device [os_error_code='28']"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        # Raised by a program whose result is awaited at once, and by one whose is not.
        (ValueError(GLOO), FAILED, "another process of the run is lost"),
        (jax.errors.JaxRuntimeError(GLOO), FAILED, "another process of the run is lost"),
        (ValueError(FULL), FAILED, "/disk/d/bf: No space left on device"),
        (RunFault("the disk is full"), FAILED, "the disk is full"),
        (ValueError("NCCL_DEBUG: found 'x'; it needs a level"), USER_ERROR, "NCCL_DEBUG: found"),
        (KeyError("bug"), FAILED, None),
    ],
)
def test_codes_of_errors_in_a_run_of_several_processes(error, code, line, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    found, said = judge_error(error)
    assert found == code and (said is None if line is None else said is not None and said.startswith(line))
