"""Runs as Slurm jobs: the script that sbatch is given, submitting it, and showing what becomes of it.

The job starts one process for each GPU, or node, and puts itself back into the queue when it fails, is preempted or
runs out of time, a bounded number of times; the run then continues from its last save.
"""

import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from realjax.core.exit_codes import FAILED, FINISHED, USER_ERROR

SCRIPT_FILE, LOG_FILE, LATEST = "job.sh", "job.log", "latest"
# Time to save before a job's time is over, or before it is preempted.
NOTICE_SECONDS = 120
# After the first process has ended, the others have so long: they notice within 60 s when it is lost.
WAIT_SECONDS = 120
POLL_SECONDS = 2.0
UNKNOWN_STATE = "UNKNOWN"
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """A run as a job: its command, in each of `tasks_per_node` processes on every node, and what it asks Slurm for."""

    name: str
    command: tuple[str, ...]
    folder: Path  # of the script and the logs, seen by all nodes
    n_nodes: int
    tasks_per_node: int
    gpus_per_node: int = 0
    account: str | None = None
    partition: str | None = None
    time: str | None = None
    nodelist: str | None = None
    exclusive: bool = False
    image: str | None = None  # of a container, run by pyxis
    mounts: str | None = None  # of the container, `from:to,...`
    num_restarts: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()  # more of sbatch's, as they are written there

    def render(self) -> str:
        """Returns the script."""
        options = "\n".join(f"#SBATCH {option}" for option in self._options())
        exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in self.environment.items())
        return TEMPLATE.format(
            options=options,
            folder=shlex.quote(str(self.folder)),
            num_restarts=self.num_restarts,
            exports=exports,
            srun=" ".join(self._srun()),
            command=shlex.join(self.command),
            final=f"{FINISHED}|{USER_ERROR}",
            failed=FAILED,
        )

    def _options(self) -> list[str]:
        given = {
            "job-name": self.name,
            "nodes": self.n_nodes,
            "ntasks-per-node": self.tasks_per_node,
            "gpus-per-node": self.gpus_per_node or None,
            "account": self.account,
            "partition": self.partition,
            "time": self.time,
            "nodelist": self.nodelist,
            "output": self.folder / LOG_FILE,
            "open-mode": "append",
            "signal": f"B:TERM@{NOTICE_SECONDS}",
        }
        texts = [f"--{name}={value}" for name, value in given.items() if value is not None]
        return [*texts, "--requeue", *["--exclusive"] * self.exclusive, *self.options]

    def _srun(self) -> list[str]:
        container = {"container-image": self.image, "container-mounts": self.mounts}
        return [
            f"--kill-on-bad-exit=0 --wait={WAIT_SECONDS}",
            '--output="$attempt/task-%t.log"',
            *(f"--{name}={shlex.quote(value)}" for name, value in container.items() if value is not None),
        ]


TEMPLATE = """#!/bin/bash
{options}

# Logs of each start are in a folder of their own, `latest` is the last one.
folder={folder}
number=1
while ! mkdir "$folder/attempt_$number" 2>/dev/null; do
    number=$((number + 1))
    [ $number -lt 100000 ] || {{ echo "job: no folder can be made in $folder"; exit {failed}; }}
done
attempt=$folder/attempt_$number
ln -sfn "attempt_$number" "$folder/latest"

restarts=${{SLURM_RESTART_COUNT:-0}}
echo "job: $SLURM_JOB_ID on $SLURM_JOB_NODELIST, attempt_$number, restart $restarts of at most {num_restarts}"
if [ "$restarts" -gt {num_restarts} ]; then
    echo "job: it was started too often (recover_retries={num_restarts})"
    exit {failed}
fi

# What XLA, CUDA and NCCL are told follows from the accelerator, which each process looks at as it starts.
{exports}srun {srun} \\
    {command} &
step=$!
# Slurm's notice: the processes save, and end.
trap 'scancel --signal=TERM "$SLURM_JOB_ID"' TERM
wait $step
code=$?
while kill -0 $step 2>/dev/null; do # a signal ended the wait, not the step
    wait $step
    code=$?
done
echo "job: attempt_$number ended with code $code"
case $code in {final}) exit $code ;; esac
# A job that somebody cancelled is not running any more, and stays cancelled.
state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
if [ "$restarts" -lt {num_restarts} ] && [ "$state" = RUNNING ]; then
    echo "job: it goes back into the queue, to continue from the last save"
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60 # Slurm ends this script
fi
exit $code
"""


def is_usable() -> bool:
    """Returns whether this machine has Slurm's commands, and a cluster that answers them."""
    if shutil.which("squeue") is None:
        return False
    asked = subprocess.run(["squeue", "--noheader", "--me"], capture_output=True, text=True)
    return asked.returncode == 0


def submit(job: SlurmJob) -> int:
    """Writes the job's script into its folder, submits it and returns its number. ValueError where Slurm refuses."""
    job.folder.mkdir(parents=True, exist_ok=True)
    script = job.folder / SCRIPT_FILE
    script.write_text(job.render(), encoding="utf-8")
    asked = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True)
    if asked.returncode != 0:
        raise ValueError(f"sbatch refuses {script}: {asked.stderr.strip() or asked.stdout.strip()}; change its options")
    return int(asked.stdout.strip().split(";")[0])


def follow(job_id: int, folder: Path, file: TextIO) -> int:
    """Prints a job's states and what its first process logs, until it is over; returns its exit code."""
    state, shown = "", dict[Path, int]()
    while True:
        now = find_state(job_id)
        if now != state:
            print(f"job {job_id}: {now}", file=file, flush=True)
            state = now
        for path in sorted(folder.glob("attempt_*/task-0.log"), key=lambda path: int(path.parent.name.split("_")[1])):
            _show_more(path, shown, file)
        if state in (*OVER, UNKNOWN_STATE):
            return find_exit_code(job_id) if state != UNKNOWN_STATE else FAILED
        time.sleep(POLL_SECONDS)


def _show_more(path: Path, shown: dict[Path, int], file: TextIO) -> None:
    with path.open("rb") as log:
        log.seek(shown.get(path, 0))
        text = log.read()
    if path not in shown:
        print(f"job: {path.parent.name}", file=file, flush=True)
    shown[path] = shown.get(path, 0) + len(text)
    file.write(text.decode(errors="replace"))
    file.flush()


def find_state(job_id: int) -> str:
    """Returns Slurm's word for the job's state, UNKNOWN where it no longer knows the job."""
    return _read_job(job_id).get("JobState", UNKNOWN_STATE)


def find_exit_code(job_id: int) -> int:
    """Returns the exit code of a job that is over, 128 and the signal's number where a signal ended it."""
    code, _, number = _read_job(job_id).get("ExitCode", f"{FAILED}:0").partition(":")
    return 128 + int(number) if int(number) else int(code)


def _read_job(job_id: int) -> dict[str, str]:
    asked = subprocess.run(["scontrol", "--oneliner", "show", "job", str(job_id)], capture_output=True, text=True)
    return dict(re.findall(r"(\w+)=(\S*)", asked.stdout)) if asked.returncode == 0 else {}


def split_environment(texts: Sequence[str]) -> dict[str, str]:
    """Returns `NAME=value` texts as a mapping. Raises ValueError for another form."""
    for text in texts:
        if not re.fullmatch(r"[A-Za-z_]\w*=.*", text, re.DOTALL):
            raise ValueError(f"--env: found {text!r}; it needs NAME=value")
    return {text.partition("=")[0]: text.partition("=")[2] for text in texts}
