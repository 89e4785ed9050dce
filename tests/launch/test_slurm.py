"""The script of a Slurm job: what it asks for, what it starts, and where it stands after each start."""

import os
import re
import shlex
import subprocess
import time
from pathlib import Path

import pytest

from realjax.apps import launcher, quickstart
from realjax.launch import slurm
from realjax.launch.slurm import SlurmJob, split_environment
from tests.given.processes import ROOT
from tests.given.runs import Given, make_options

# Stands in for Slurm's commands: writes down how each is called, and answers as `answers` says.
FAKE = """#!/bin/bash
echo "$(basename "$0") $*" >>"$CALLS"
case $(basename "$0") in
    srun) eval "$STEP" ;;
    squeue) echo "${STATE:-RUNNING}" ;;
    sleep) ;;
esac
"""


def words(given: Given, root: Path, **changes: object) -> list[str]:
    options = make_options("sft", given, root, **{"allocation_mode": "pipe_data", **changes})
    return ["sft", *(f"{name}={value}" for name, value in options.items())]


def dry_run(capsys: pytest.CaptureFixture, *args: str) -> str:
    assert quickstart.main(["launch", "slurm", "--dry-run", *args]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def find_options(script: str) -> dict[str, str]:
    found = re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, re.M)
    assert len(dict(found)) == len(found)
    return dict(found)


def find_command(script: str) -> list[str]:
    line = script[script.index("srun ") : script.index(" &\n")].replace("\\\n", " ")
    return shlex.split(line)


def test_the_job_asks_for_what_the_run_needs(given, tmp_path, capsys):
    run = words(given, tmp_path, n_nodes=2, n_gpus_per_node=4, partition="gpu", recover_retries=7, recover_mode="auto")
    flags = ["--account", "us", "--time", "4:00:00", "--exclusive", "--env", "NCCL_DEBUG=a b", "--sbatch=--qos=low"]
    script = dry_run(capsys, *flags, *run)
    options = find_options(script)
    logs = tmp_path / "logs"
    (folder,) = {Path(options.pop("output")).parent}
    assert folder.is_relative_to(logs) and folder.name == "trial.slurm"
    assert options == {
        "job-name": "e2e_trial",
        "nodes": "2",
        "ntasks-per-node": "4",
        "gpus-per-node": "4",
        "account": "us",
        "partition": "gpu",
        "time": "4:00:00",
        "open-mode": "append",
        "signal": "B:TERM@120",
        "requeue": "",
        "exclusive": "",
        "qos": "low",
    }
    assert "export NCCL_DEBUG='a b'\n" in script and "-gt 7 ]" in script
    command = find_command(script)
    assert command[command.index("-m") :][:3] == ["-m", "realjax.apps.quickstart", "sft"]
    assert set(run) <= set(command)
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_a_run_that_may_start_again_has_its_names_and_continues(given, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = [word for word in words(given, tmp_path) if not word.startswith(("trial_name", "fileroot"))]
    command = find_command(dry_run(capsys, "--no-gpus", *run, "fileroot=runs"))
    last = {word.partition("=")[0]: word.partition("=")[2] for word in command}
    assert last["recover_mode"] == "auto" and re.match(r"run\d{4}", last["trial_name"])
    assert last["fileroot"] == str(tmp_path / "runs")


def test_a_container_and_the_number_of_tasks(given, tmp_path, capsys):
    run = words(given, tmp_path, n_gpus_per_node=2, image_name="repo/image:1")
    script = dry_run(capsys, "--mounts", "/data:/data", "--tasks", "node", "--python", "python3", *run)
    command = find_command(script)
    assert "--container-image=repo/image:1" in command and "--container-mounts=/data:/data" in command
    assert "python3" in command and find_options(script)["ntasks-per-node"] == "1"
    without = find_options(dry_run(capsys, "--no-gpus", *run))
    assert without["ntasks-per-node"] == "1" and "gpus-per-node" not in without


# ml_collections 1.1 loads recipes by a method that Python is giving up.
@pytest.mark.filterwarnings(r"ignore:the load_module\(\) method is deprecated:DeprecationWarning")
def test_a_recipe_is_a_run_too(given, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    paths = {"model.path": given.language_model, "dataset.train_path": given.train, "dataset.valid_path": given.valid}
    flags = [f"--config.{name}={value}" for name, value in paths.items()]
    command = find_command(dry_run(capsys, "--no-gpus", "--config=configs/sft.py", *flags))
    assert command[command.index("-m") + 1] == "realjax.apps.recipe"
    assert "--config.recover_mode=auto" in command and "--config.trial_name=release" in command


@pytest.mark.parametrize("spell", ["--config={}", "--config {}"])
def test_a_file_of_options_is_no_recipe(given, tmp_path, capsys, spell):
    experiment, *run = words(given, tmp_path, n_gpus_per_node=2, recover_mode="resume")
    file = tmp_path / "run.yaml"
    file.write_text("".join(f"{word.replace('=', ': ', 1)}\n" for word in run))
    flags = spell.format(file).split()
    script = dry_run(capsys, experiment, *flags)
    assert find_options(script)["ntasks-per-node"] == "2"
    command = find_command(script)
    place = command.index("-m")
    assert command[place : place + 3 + len(flags)] == ["-m", "realjax.apps.quickstart", experiment, *flags]
    assert "recover_mode=resume" in command


def test_a_file_of_options_says_what_the_local_launcher_reads(tmp_path, monkeypatch):
    file, seen = tmp_path / "run.yaml", []
    file.write_text("n_gpus_per_node: 4\nrecover_mode: auto\nrecover_retries: 3\n")
    monkeypatch.setattr("realjax.launch.local.run_processes", lambda *given: seen.append(given) or 0)
    assert quickstart.main(["launch", "local", "--per-device", "--", "sft", "--config", str(file)]) == 0
    ((command, share, num_retries),) = seen
    assert (share.processes, num_retries) == (4, 3) and "recover_mode=auto" in command


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "launch: found ''; it needs one of"),
        (["pbs"], "launch: found 'pbs'"),
        (["slurm"], "launch: no experiment was given"),
        (["slurm", "sfd"], "unknown experiment 'sfd'"),
        (["slurm", "sft", "model.path="], "model.path: nothing given"),
        (["slurm", "--env", "A-B", "sft"], "--env: found 'A-B'"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_submitted(args, message, given, tmp_path, capsys):
    run = words(given, tmp_path)[1:] if args[-1:] == ["sft"] else []
    assert quickstart.main(["launch", *args, *run]) == 2
    assert f"realjax: error: {message}" in capsys.readouterr().err


class Job:
    """A script run by bash, with stand-ins for Slurm's commands, start after start."""

    def __init__(self, folder: Path, num_restarts: int = 1) -> None:
        self.folder, self.calls = folder / "job.slurm", folder / "calls"
        self.folder.mkdir()
        (folder / "bin").mkdir()
        for name in ("srun", "squeue", "scontrol", "scancel", "sleep"):
            path = folder / "bin" / name
            path.write_text(FAKE)
            path.chmod(0o755)
        job = SlurmJob(
            name="job", command=("run",), folder=self.folder, n_nodes=1, tasks_per_node=1, num_restarts=num_restarts
        )
        self.script = folder / "job.sh"
        self.script.write_text(job.render())
        self.environment = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "CALLS": str(self.calls)}
        self.environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}

    def start(self, step: str, restarts: int = 0, **environment: str) -> subprocess.Popen:
        self.calls.write_text("")
        own = {"STEP": step, "SLURM_RESTART_COUNT": str(restarts)}
        env = self.environment | own | environment
        return subprocess.Popen(["bash", str(self.script)], env=env, stdout=subprocess.PIPE, text=True)

    def run(self, step: str, restarts: int = 0, **environment: str) -> tuple[int, bool]:
        """Returns the script's exit code, and whether it put the job back into the queue."""
        process = self.start(step, restarts, **environment)
        code = process.wait(60)
        assert process.stdout is not None
        process.stdout.close()
        return code, "scontrol requeue 7" in self.calls.read_text()


def test_each_start_has_a_folder_and_latest_is_the_last(tmp_path):
    job = Job(tmp_path)
    for number in (1, 2):
        assert job.run("exit 0") == (0, False)
        assert (job.folder / "latest").resolve() == (job.folder / f"attempt_{number}").resolve()
    assert f"--output={job.folder}/attempt_2/task-%t.log" in job.calls.read_text()


@pytest.mark.parametrize(
    ("code", "restarts", "state", "again"),
    [
        (75, 0, "RUNNING", True),
        (143, 0, "RUNNING", True),
        (75, 1, "RUNNING", False),
        (2, 0, "RUNNING", False),
        (143, 0, "COMPLETING", False),
    ],
)
def test_a_job_goes_back_into_the_queue_where_that_helps(code, restarts, state, again, tmp_path):
    assert Job(tmp_path).run(f"exit {code}", restarts, STATE=state) == (code, again)


def test_a_job_that_was_preempted_too_often_does_not_start(tmp_path):
    job = Job(tmp_path)
    assert job.run("exit 0", restarts=2)[0] == 1
    assert "srun" not in job.calls.read_text()


def test_slurms_notice_is_passed_on_and_the_save_waited_for(tmp_path):
    job = Job(tmp_path)
    # The processes take a while to save after the notice, which the stand-in waits for.
    step = f"until grep -q scancel {job.calls}; do /bin/sleep 0.05; done; /bin/sleep 0.3; exit 143"
    process = job.start(step)
    while "srun" not in job.calls.read_text():
        time.sleep(0.02)
    process.terminate()
    assert process.wait(60) == 143
    assert process.stdout is not None
    assert "ended with code 143" in process.stdout.read()
    process.stdout.close()
    assert "scancel --signal=TERM 7" in job.calls.read_text() and "scontrol requeue 7" in job.calls.read_text()


def test_an_environment_is_names_and_values():
    assert split_environment(["A=1", "B=c=d", "E="]) == {"A": "1", "B": "c=d", "E": ""}


def test_without_its_commands_there_is_no_cluster(monkeypatch):
    monkeypatch.setattr(slurm.shutil, "which", lambda program: None)
    assert not slurm.is_usable()


def test_every_launcher_says_what_it_takes(capsys):
    assert launcher.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in launcher.LAUNCHERS)


def test_the_script_in_the_documentation_is_what_is_rendered():
    text = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    script = text.split("```sh\n")[1].split("```")[0]
    (folder,) = re.findall(r"^folder=(.*)$", script, re.M)
    words = find_command(script)
    command = tuple(words[words.index("python3") :])
    name = find_options(script)["job-name"]
    job = SlurmJob(name=name, command=command, folder=Path(folder), n_nodes=2, tasks_per_node=1, num_restarts=3)
    assert job.render() == script
