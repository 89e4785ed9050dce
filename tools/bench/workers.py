"""Loops to measure, each in a process of its own, so that no library's threads disturb another's."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any


class Worker:
    """A loop in a process of its own, which takes numbers of steps and answers each with a line of JSON."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log, pipe = log, subprocess.PIPE
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=file, text=True)

    def read(self) -> Any:
        """Returns the next answer; the first, before any steps are asked for, describes the loop."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args}: ended without an answer:\n{self.log.read_text()}")
        return json.loads(line)

    def run(self, steps: int) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return self.read()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def start_workers(module: str, names: Iterable[str], *flags: str) -> Iterator[dict[str, Worker]]:
    """Gives a worker of each name: `module` with this process's own arguments, `--worker NAME` and `flags`.

    None is left when the block ends.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as ends:
        workers = {}
        for name in names:
            command = [sys.executable, "-m", module, *sys.argv[1:], "--worker", name, *flags]
            workers[name] = Worker(command, Path(folder) / f"{name}.log")
            ends.callback(workers[name].end)
        yield workers
