"""Faults at random in a PPO of two processes, which is started again until it is done: each is told, and outlived.

    python -m tests.e2e.faults --seed 0 --faults 10     # prints a table; needs pytest's environment
    python -m tests.e2e.faults --kills --faults 12      # SIGKILL alone, while answers are drawn two steps ahead

One run takes all the faults, one after the other at random moments between two steps, and ends with the bits of a run
that had none. The disk that fills up is a small tmpfs, where one can be mounted; elsewhere that fault is left out.
"""

import argparse
import gzip
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.given.commands import Trial
from tests.given.compare import find_differing
from tests.given.launched import session_of, started, wait_until, workers_of
from tests.given.runs import write_given

KINDS = ("kill a worker", "kill the launcher", "stop a worker", "fill the disk", "another call", "a reward hangs")
FULL_SECONDS, DISK_MIB = 10, 256
WATCHDOG_SECONDS = 15
# By fault, after which it has to be noticed: at once, when the coordinator has not heard of a process, by the watchdog.
BOUNDS = {"stop a worker": 40, "another call": 6, "a reward hangs": WATCHDOG_SECONDS}
MOST_SECONDS_BEYOND = 60
STEPS_PER_EPOCH = 8  # 32 prompts, 4 at a time
STEPS_PER_FAULT = 4  # two before it, one on its way to be noticed, one after it
OPTIONS = {
    "allocation_mode": "d2p1m1",
    "n_gpus_per_node": 2,
    "dataset.train_bs_n_seqs": 4,
    "algo.ppo_n_minibatches": 1,
    "save_freq_steps": 1,
    "watchdog_secs": WATCHDOG_SECONDS,
    "reward.fn": "tests.given.rewards:shortness",
}
KILLS = ("kill a worker", "kill the launcher")
# Each process trains or draws, with half of a step's answers to the next two steps' prompts begun beside it.
AHEAD = {
    "staleness": 2,
    "allocation_mode": "heuristic",
    "algo.gen.max_new_tokens": 64,
    "algo.gen.num_slots": 6,
    "rollouts.keep": True,
}
LAUNCHER = """
import sys
from realjax.launch import local, restarts
restarts.FIRST_PAUSE_SECONDS, restarts.LONGEST_PAUSE_SECONDS = 1.0, 4.0
program = '''
import os, sys, time
from pathlib import Path
from realjax.apps.quickstart import main
from realjax.runtime.executor import Executor
from tests.given import rewards
orders, number = Path(sys.argv.pop(1)), os.environ["REALJAX_PROCESS_ID"]

def is_ordered(fault):
    try:
        (orders / f"{fault} {number}").unlink()
    except FileNotFoundError:
        return False
    return True

def step_elsewhere(self, batch, i, calls=None, step=Executor.step):
    if is_ordered("another call"):
        self.progress.begin("another call", i)
        time.sleep(1e5)
    return step(self, batch, i, calls)

def reward(prompts, answers, rows, fn=rewards.shortness):
    if is_ordered("a reward hangs"):
        time.sleep(1e5)
    return fn(prompts, answers, rows)

Executor.step, rewards.shortness = step_elsewhere, reward
sys.exit(main(["ppo", *sys.argv[1:]]))
'''
command = [sys.executable, "-c", program, *sys.argv[1:]]
sys.exit(local.run_processes(command, local.Share(processes=2), 1000))
"""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a fault: after how many seconds it was noticed, and the next step was done."""

    kind: str
    process: int
    step: int
    noticed: float
    recovered: float
    text: str
    num_lost: int  # saves

    @property
    def is_well(self) -> bool:
        return not self.num_lost and self.noticed <= BOUNDS.get(self.kind, 0) + MOST_SECONDS_BEYOND

    def __str__(self) -> str:
        times = f"{self.noticed:7.1f} {self.recovered:9.1f}"
        return f"{self.kind:18} {self.process:7} {self.step:4} {times} {self.num_lost:5}  {self.text[:110]}"


class Faults:
    """A trial under way, its log, and its faults."""

    def __init__(self, trial: Trial, folder: Path, seed: int) -> None:
        self.trial, self.draw = trial, random.Random(seed)
        self.log, self.orders = folder / f"{trial.name}.log", folder / "orders"
        self.orders.mkdir(exist_ok=True)
        self.outcomes: list[Outcome] = []
        self.saved_at_end: int | None = None  # the last save when a disk that was full had room again

    def command(self) -> list[str]:
        return ["-c", LAUNCHER, str(self.orders), *self.trial.words(recover_mode="auto")]

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def num_steps(self) -> int:
        """Returns the steps that are done and told."""
        return max((int(step) for step in re.findall(r"\(global step (\d+)\):", self.text())), default=0)

    def last_save(self) -> int:
        names = [path.name for path in self.trial.folder("recover").glob("*")]
        return max((int(name) for name in names if name.isdigit()), default=0)

    def run(self, kinds: list[str]) -> None:
        """Has each of the faults happen after a few steps more, and the run end."""
        while True:
            with started(self.command(), self.log) as launcher:
                while kinds:
                    # A step after the last one that was told, and one that is saved.
                    done = self.num_steps()
                    wait_until(lambda: self.num_steps() > done and self.last_save() > 0, launcher, self.log)  # noqa: B023
                    time.sleep(self.draw.uniform(0, 1))
                    kind = kinds.pop(0)
                    self.suffer(kind, launcher)
                    if kind == "kill the launcher":
                        break
                else:
                    assert launcher.wait(3600) == 0, self.text()
                    return

    def suffer(self, kind: str, launcher: subprocess.Popen) -> None:
        """Has the fault happen, and waits until it is noticed and, where its launcher lives, the run has gone on."""
        # Rewards are computed in the first process alone.
        process = 0 if kind == "a reward hangs" else self.draw.randrange(2)
        step, saved = self.num_steps(), self.last_save()
        start, length = time.monotonic(), len(self.text())
        new_text = lambda: self.text()[length:]
        if kind == "kill the launcher":
            launcher.kill()
            launcher.wait()
            while session_of(launcher):
                time.sleep(0.05)
            noticed = recovered = time.monotonic() - start
            text = "all processes are gone"
        else:
            self.begin(kind, process, launcher)
            has_ended = lambda: "launch: the run ended with code" in new_text()
            wait_until(lambda: has_ended() or self.is_unharmed(kind), launcher, self.log)
            # What did no harm is noticed by nobody.
            noticed, text = (time.monotonic() - start) * has_ended(), describe(new_text())
            if has_ended():
                wait_until(lambda: self.has_new_step(new_text()), launcher, self.log)
            recovered = time.monotonic() - start
        found = [int(n) for n in re.findall(r"continuing after step (\d+)", new_text())]
        num_lost = max(0, saved - min(found, default=self.last_save()))
        outcome = Outcome(
            kind=kind, process=process, step=step, noticed=noticed, recovered=recovered, text=text, num_lost=num_lost
        )
        print(outcome, flush=True)
        self.outcomes.append(outcome)

    @staticmethod
    def has_new_step(text: str) -> bool:
        _, again, rest = text.rpartition("continuing after step")
        return bool(again) and re.search(r"\(global step \d+\):", rest) is not None

    def is_unharmed(self, kind: str) -> bool:
        """Whether a disk was full while nothing was written, as what was written afterwards shows."""
        return kind == "fill the disk" and self.saved_at_end is not None and self.last_save() > self.saved_at_end

    def empty(self, filler: Path) -> None:
        filler.unlink(missing_ok=True)  # a test that failed may have removed all
        self.saved_at_end = self.last_save()

    def begin(self, kind: str, process: int, launcher: subprocess.Popen) -> None:
        if kind == "kill a worker":
            workers_of(launcher)[process].kill()
        elif kind == "stop a worker":
            workers_of(launcher)[process].suspend()
        elif kind == "fill the disk":
            filler, self.saved_at_end = self.trial.root / "filler", None
            fill(filler)
            threading.Timer(FULL_SECONDS, self.empty, [filler]).start()
        else:
            (self.orders / f"{kind} {process}").touch()


def fill(path: Path) -> None:
    """Writes a file until nothing more fits."""
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(b"\0" * 65536):
                pass
        except OSError:
            pass


def describe(text: str) -> str:
    """Returns the line that said what was wrong."""
    lines = [line for line in text.splitlines() if "watchdog ERROR" in line or "realjax: error:" in line]
    lines += [line for line in text.splitlines() if "launch: a process ended" in line]
    if not lines:
        return "nothing was written meanwhile"
    return re.sub(r"^(\[[\d-]+\] )?(\S+ )?(watchdog ERROR: |realjax: error: )?", "", lines[0])


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """While entered, the folder is a small file system of its own, where that can be; yields whether it is."""
    folder.mkdir(exist_ok=True)
    options = ["-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)]
    is_mounted = os.geteuid() == 0 and subprocess.run(["mount", *options], capture_output=True).returncode == 0
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def read_prompts(trial: Trial) -> dict[str, list[int]]:
    """Returns the prompts that each step was trained on, where all its answers are kept."""
    files = trial.folder("logs").glob("rollouts/step*.jsonl.gz")
    lines = {file.name: gzip.decompress(file.read_bytes()).splitlines() for file in files}
    return {name: sorted(json.loads(line)["prompt_id"] for line in of_step) for name, of_step in lines.items()}


def suffer_all(folder: Path, kinds: list[str], seed: int, changes: Mapping[str, object] | None = None) -> list[Outcome]:
    """Returns the outcomes of the faults of a run. Fails unless it ends with the bits of one without.

    `changes` are options of it.
    """
    epochs = -(-len(kinds) * STEPS_PER_FAULT // STEPS_PER_EPOCH)
    given, options = write_given(folder), {**OPTIONS, "total_train_epochs": epochs, **(changes or {})}
    whole = Trial(given=given, root=folder, name="whole", experiment="ppo", options=options)
    with small_disk(folder / "disk") as is_small:
        kinds = [kind for kind in kinds if is_small or kind != "fill the disk"]
        trial = Trial(given=given, root=folder / "disk", name="faults", experiment="ppo", options=options)
        Faults(whole, folder, seed).run([])
        faults = Faults(trial, folder, seed)
        faults.run(kinds)
        steps = STEPS_PER_EPOCH * epochs
        for role in ("actor", "critic"):
            assert not find_differing(trial.state(steps, role), whole.state(steps, role)), role
            assert not find_differing(trial.weights(steps, role), whole.weights(steps, role)), role
        assert trial.steps() == whole.steps() == list(range(1, steps + 1))
        if (prompts := read_prompts(whole)) or "rollouts.keep" in options:
            assert read_prompts(trial) == prompts and sorted(sum(prompts.values(), [])) == sorted(epochs * [*range(32)])
    return faults.outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=6)
    parser.add_argument("--kills", action="store_true", help="kills alone, with answers drawn two steps ahead")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    of = KILLS if args.kills else KINDS
    kinds = [kind for _ in range(-(-args.faults // len(of))) for kind in draw.sample(of, len(of))]
    print(f"{'fault':18} {'process':>7} {'step':>4} {'noticed':>7} {'recovered':>9} {'lost':>5}  said")
    with tempfile.TemporaryDirectory() as folder:
        outcomes = suffer_all(Path(folder), kinds[: args.faults], args.seed, AHEAD if args.kills else None)
    bad = [outcome for outcome in outcomes if not outcome.is_well]
    print(f"{len(outcomes)} faults, {len(bad)} not well; the parameters are those of a run without")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
