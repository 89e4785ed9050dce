"""Signals that stop a command: the first lets it end well, the second ends it at once."""

import logging
import os
import signal
import sys
import threading
from types import FrameType, TracebackType

logger = logging.getLogger("realjax.stop")
STOPS = (signal.SIGINT, signal.SIGTERM)
FAILED = 255  # what a process tells the others in place of such a code when it cannot go on; above all of them
SHOW_CURSOR = b"\x1b[?25h\n"


class Stopped(BaseException):
    """A signal ended the command. Like KeyboardInterrupt it is no error, so that nothing takes it for one."""

    def __init__(self, number: int) -> None:
        self.code = exit_code(number)
        super().__init__(signal_name(self.code))


def exit_code(number: int) -> int:
    """Returns the shell's code for a process that the signal ended: 130 for SIGINT, 143 for SIGTERM."""
    return 128 + number


def signal_name(code: int) -> str:
    """Returns the name of the signal with this exit code."""
    return signal.Signals(code - 128).name


class StopSignal:
    """While entered, the first SIGINT or SIGTERM raises `Stopped`, or, deferred, is only noted in `code`.

    A second one ends the process at once, with the code of that signal, also while a program compiles: Python would
    see it only afterwards, so a thread waits for it. Outside of the main thread, which alone gets signals, it does
    nothing.
    """

    def __init__(self, *, is_deferred: bool = False) -> None:
        self._is_deferred = is_deferred
        self._number: int | None = None

    @property
    def code(self) -> int:
        """The exit code that the signal asks for, 0 before one came."""
        return 0 if self._number is None else exit_code(self._number)

    def defer(self) -> None:
        """From now on a signal is only noted."""
        self._is_deferred = True

    def __enter__(self) -> "StopSignal":
        self._is_main = threading.current_thread() is threading.main_thread()
        if self._is_main:
            reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._previous_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            self._previous = {number: signal.signal(number, self._receive) for number in STOPS}
            self._watcher = threading.Thread(target=self._watch, args=(reader,), daemon=True)
            self._watcher.start()
            self._hook, sys.unraisablehook = sys.unraisablehook, self._end_if_swallowed
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_main:
            sys.unraisablehook = self._hook
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._previous_fd)
            os.close(self._writer)
            self._watcher.join()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        is_first, self._number = self._number is None, self._number or number
        if is_first and not self._is_deferred:
            raise Stopped(number)

    def _end_if_swallowed(self, stray: "sys.UnraisableHookArgs") -> None:
        """Ends the process where `Stopped` was raised in a callback that lets no error out, as the collector's do."""
        if not isinstance(stray.exc_value, Stopped):
            self._hook(stray)
            return
        print(f"realjax: stopped by {stray.exc_value} before there was anything to save", file=sys.stderr, flush=True)
        os._exit(stray.exc_value.code)

    def _watch(self, reader: int) -> None:
        """Counts signals as the system delivers them, whatever the main thread is doing."""
        num_received = 0
        with open(reader, "rb", buffering=0) as pipe:
            while signals := pipe.read(1):
                if (number := signals[0]) not in STOPS:
                    continue  # of a handler that is not ours
                num_received += 1
                if num_received == 2:
                    if sys.__stdout__ is not None and sys.__stdout__.isatty():
                        os.write(sys.__stdout__.fileno(), SHOW_CURSOR)  # a progress bar has hidden it
                    os._exit(exit_code(number))
                if self._is_deferred:
                    name = signal.Signals(number).name
                    logger.info("%s: the run ends after what is under way, saved; once more ends it at once", name)
