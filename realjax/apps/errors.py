"""How a command ends: its exit code, and a line for whatever is no bug."""

import gc
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import jax

from realjax.core.exit_codes import FAILED, USER_ERROR
from realjax.core.faults import RunFault, system_reason
from realjax.launch.environment import leave, lost_process
from realjax.record.console import quiet_libraries
from realjax.runtime.stop import Stopped, StopSignal


@dataclass
class End:
    """The exit code of a command."""

    code: int = 0


@contextmanager
def report_errors(program: str = "realjax") -> Iterator[End]:
    """Gives the command's end, whose code an error decides.

    What is no bug becomes one line on stderr: a user's error with the code 2, a fault of the machine with 1, a signal
    with its own, such as 130. Of several processes, one with an error ends at once, so that the others do not wait.
    """
    end = End()
    with quiet_libraries():
        try:
            with StopSignal():
                yield end
        except Stopped as stop:
            _report(f"stopped by {stop} before there was anything to save", stop.code, program)
            end.code = stop.code
        except Exception as error:
            end.code, line = judge_error(error)
            if line is None or os.environ.get("REALJAX_TRACEBACK") == "1":
                if not jax.distributed.is_initialized():
                    raise
                traceback.print_exc()
                leave(end.code)
            _report(f"error: {line}", end.code, program)
        gc.collect()  # futures of a save that failed, which would tell of it as the process ends


def _report(line: str, code: int, program: str) -> None:
    print(f"{program}: {line}", file=sys.stderr)
    if jax.distributed.is_initialized():
        leave(code)


def judge_error(error: Exception) -> tuple[int, str | None]:
    """Returns the exit code of a command that an error ends, and the error in a line: None for a bug's, whose traceback
    is what helps.

    Only a USER_ERROR keeps launchers from another attempt, so a ValueError of the libraries', of a lost process or of
    the operating system, is none.
    """
    if isinstance(error, RunFault):
        return FAILED, str(error)
    if jax.distributed.is_initialized() and (reason := lost_process(error)) is not None:
        return FAILED, f"another process of the run is lost ({reason}); its own last lines say why"
    if (reason := system_reason(error)) is not None:
        return FAILED, reason
    return (USER_ERROR, str(error)) if isinstance(error, ValueError) else (FAILED, None)


def end_process(code: int) -> NoReturn:
    """Ends the process of a command. After a fault at once: threads of a save that failed have nothing more to tell."""
    if code == FAILED:
        leave(code)
    sys.exit(code)
