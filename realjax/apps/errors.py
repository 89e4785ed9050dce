"""How a command ends: its exit code, and a line for whatever is no bug."""

import gc
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import jax

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

    What is no bug becomes one line on stderr: a ValueError with the code 2, a fault of the machine with 1, a signal
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
            end.code = 2 if isinstance(error, ValueError) else 1
            line = describe_error(error)
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


def describe_error(error: Exception) -> str | None:
    """Returns an error in a line, or None where it is a bug, whose traceback is what helps."""
    if isinstance(error, ValueError | RunFault):
        return str(error)
    if jax.distributed.is_initialized() and (reason := lost_process(error)) is not None:
        return f"another process of the run is lost ({reason}); its own last lines say why"
    return system_reason(error)
