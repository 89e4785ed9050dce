"""A run that was killed, stopped or moved to another layout ends where the uninterrupted one does."""

import json
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.test_families import CONFIGS
from tests.given.checkpoints import edit_tensors, write_family, write_llama
from tests.given.commands import Given, Trial, stopped_after
from tests.given.compare import find_differing, without_clocks
from tests.given.texts import write_jsonl

OPTIONS = {
    "allocation_mode": "manual",
    "n_gpus_per_node": 2,
    "allocation.parallel.data_parallel_size": 2,
    "dataset.train_bs_n_seqs": 48,
    "total_train_epochs": 2,
    "recover_mode": "auto",
}
STEPS = 22  # 2 epochs of 520 rows, 48 at a time
FEW = {"dataset.train_bs_n_seqs": 130}
FEW_STEPS = 8


@pytest.fixture(scope="module")
def whole(given: Given, tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """The uninterrupted run of few steps, with the fileroot of those to compare with it."""
    trial = Trial(given=given, root=tmp_path_factory.mktemp("resume"), name="whole", options=OPTIONS | FEW)
    assert trial.run() == 0
    return trial


def another(whole: Trial, name: str, **options) -> Trial:
    return Trial(given=whole.given, root=whole.root, name=name, options={**whole.options, **options})


def assert_same_end(found: Trial, expected: Trial, step: int) -> None:
    """Fails unless both trials have the same weights and moments, and each step of the metrics exactly once."""
    assert found.steps() == list(range(1, step + 1))
    assert without_clocks(found.metrics()) == without_clocks(expected.metrics())
    assert not find_differing(found.weights(step), expected.weights(step))
    assert not find_differing(found.state(step), expected.state(step))


def wait_until(condition: Callable[[], bool], process, log: Path) -> None:
    """Returns as soon as it holds; fails when the process ends before."""
    while not condition():
        assert process.poll() is None, f"ended before it could be killed\n{log.read_text()}"
        time.sleep(0.0005)


@pytest.mark.e2e
def test_a_run_killed_again_and_again_ends_like_one_that_was_not(given, tmp_path):
    whole = Trial(given=given, root=tmp_path, name="whole", options=OPTIONS)
    trial = Trial(given=given, root=tmp_path, name="killed", options=OPTIONS | {"save_freq_steps": 2})
    log, recover, exports = tmp_path / "killed.log", trial.folder("recover"), trial.folder("checkpoints") / "default"
    seed = random.SystemRandom().randrange(10**6)
    delay = random.Random(seed).uniform(0.0, 0.4)
    print(f"seed {seed}: the third kill comes {delay:.3f} s after a step")

    def has_new_line(start: int) -> bool:
        return re.search(r"global step \d+\):", log.read_text()[start:]) is not None

    moments: list[tuple[Callable[[int], bool], float]] = [
        (lambda start: any(recover.glob("*tmp*")), 0.0),  # while the training state is being written
        (lambda start: any(exports.glob(".*writing")), 0.0),  # while the checkpoint is
        (has_new_line, delay),
    ]
    for is_reached, pause in moments:
        start = len(log.read_text()) if log.exists() else 0
        process = trial.start()
        wait_until(lambda: is_reached(start), process, log)  # noqa: B023 - called before the loop goes on
        time.sleep(pause)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    start = len(log.read_text())
    process = trial.start()
    wait_until(lambda: has_new_line(start), process, log)
    process.terminate()
    assert process.wait() == 143, log.read_text()
    stopped = int(re.findall(r"stopped by SIGTERM after step (\d+)", log.read_text())[-1])
    assert (recover / str(stopped)).is_dir()
    process = trial.start()
    assert process.wait() == 0, log.read_text()
    assert f"continuing after step {stopped}, saved in {recover}" in log.read_text()
    # In a process like the others: with another number of virtual devices XLA's threads, and so its sums, are others.
    assert whole.start().wait() == 0
    assert_same_end(trial, whole, STEPS)
    # Every export that was due is there, whole, and nothing half-written beside it.
    due = sorted({*range(2, STEPS + 1, 2), STEPS})
    assert sorted(int(path.name.split("globalstep")[1]) for path in exports.iterdir()) == due
    for step in due:
        assert trial.weights(step).keys() == whole.weights(STEPS).keys()


@pytest.mark.parametrize("step", [3, FEW_STEPS], ids=["midway", "in the last step"])
def test_a_stopped_run_saves_and_is_continued(step, whole):
    trial = another(whole, f"stopped-{step}")
    with stopped_after(step):
        assert trial.run() == (0 if step == FEW_STEPS else 143)
    assert trial.steps() == list(range(1, step + 1))
    assert trial.run() == 0
    assert_same_end(trial, whole, FEW_STEPS)


@pytest.mark.slow
def test_a_run_goes_on_in_another_layout(whole):
    trial = another(whole, "moved")
    with stopped_after(4):
        assert trial.run(**layout_options(dp=4, tp=2, sp=True), save_freq_steps=4) == 143
    assert trial.steps() == [1, 2, 3, 4]
    assert trial.run(**layout_options(dp=2, tp=2, zero=3)) == 0
    assert trial.steps() == list(range(1, FEW_STEPS + 1))
    assert_same_work(trial, whole, 4)


@pytest.mark.slow
def test_a_run_goes_on_with_other_stages(given, tmp_path):
    """Three layers: in two stages with an empty one, in one stage without, and again in two."""
    model = write_llama(tmp_path / "llama", num_hidden_layers=3)
    whole = Trial(given=given, root=tmp_path, name="whole", options=OPTIONS | FEW | {"model.path": model})
    assert whole.run() == 0
    trial, stages = another(whole, "stages"), layout_options(pp=2)
    with stopped_after(3):
        assert trial.run(**stages) == 143
    with stopped_after(6):
        assert trial.run(save_freq_steps=6) == 143
    assert trial.run(**stages) == 0
    assert trial.steps() == list(range(1, FEW_STEPS + 1))
    assert_same_work(trial, whole, 6)
    stacks = [leaf for name, leaf in trial.state(FEW_STEPS).items() if "layers" in name]
    assert len(stacks) == 27 and all(len(leaf) == 4 and not leaf[3].any() for leaf in stacks)


@pytest.mark.slow
def test_experts_go_on_where_they_lie_otherwise(given, tmp_path):
    """Split over two devices, then each in two parts by its columns, then over two of four by whole and by columns."""
    model = write_family(tmp_path / "moe", "qwen3_moe", **CONFIGS["qwen3_moe"])
    whole = Trial(given=given, root=tmp_path, name="whole", options=OPTIONS | FEW | {"model.path": model})
    assert whole.run() == 0
    trial = another(whole, "experts")
    with stopped_after(2):
        assert trial.run(**layout_options(dp=2, ep=2)) == 143
    with stopped_after(4):
        assert trial.run(**layout_options(tp=2), save_freq_steps=4) == 143
    assert trial.run(**layout_options(dp=4, tp=2, ep=2)) == 0
    assert trial.steps() == list(range(1, FEW_STEPS + 1))
    assert_same_work(trial, whole, 4)
    losses, expected = ([record["loss"] for record in one.metrics("train")] for one in (trial, whole))
    assert losses == pytest.approx(expected, rel=1e-5)


def assert_same_work(found: Trial, expected: Trial, step: int) -> None:
    """Fails unless what both trials did after `step` steps is the same, empty layers aside."""
    for find in (Trial.weights, Trial.state):
        a, b, start = find(found, FEW_STEPS), find(expected, FEW_STEPS), find(found, step)
        assert a.keys() == b.keys()
        for name, leaf in b.items():
            own = tuple(map(slice, leaf.shape))
            # As a share of what the steps changed: steps that did nothing would not pass.
            change = np.linalg.norm(np.float64(leaf) - start[name][own])
            error = np.linalg.norm(np.float64(a[name][own]) - leaf)
            assert error <= 1e-3 * change, name


def layout_options(*, dp: int = 1, pp: int = 1, tp: int = 1, ep: int = 1, sp: bool = False, zero: int = 2) -> dict:
    return {
        "n_gpus_per_node": dp * pp * tp,
        "allocation__parallel__pipeline_parallel_size": pp,
        "allocation__parallel__data_parallel_size": dp,
        "allocation__parallel__model_parallel_size": tp,
        "allocation__parallel__expert_parallel_size": ep,
        "allocation__parallel__use_sequence_parallel": sp,
        "model__zero_stage": zero,
    }


def test_a_finished_run_is_left_as_it_is(whole, capsys):
    before = contents(whole.root)
    assert whole.run() == 0
    assert f"all {FEW_STEPS} steps were done before" in capsys.readouterr().out
    assert contents(whole.root) == before


def contents(folder: Path) -> dict[str, bytes]:
    """Returns all files of a folder but those that tell of every start: the log and the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".log", ".lock"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_starting_anew_says_what_is_there_and_keeps_it(whole, capsys):
    trial = another(whole, "again")
    with stopped_after(2):
        assert trial.run(save_freq_steps=2) == 143
    kinds = ("logs", "checkpoints", "recover")
    before = {kind: contents(trial.folder(kind)) for kind in kinds}
    capsys.readouterr()
    assert trial.run(recover_mode="disabled", benchmark_steps=1) == 0
    output = capsys.readouterr().out
    assert "WARNING: a saved state of this trial exists; recover_mode=auto would continue it" in output
    assert trial.steps() == [1]
    for kind in kinds:
        folder = trial.folder(kind)
        assert f"kept the earlier run's {folder} as again.1" in output
        assert contents(folder.with_name("again.1")) == before[kind]


def test_resume_must_find_a_save(whole, capsys):
    trial = another(whole, "absent")
    # What a run that was killed during its first save leaves is none.
    (trial.folder("recover") / "2.orbax-checkpoint-tmp").mkdir(parents=True)
    assert trial.run(recover_mode="resume") == 2
    assert "realjax: error: recover_mode: resume, but" in capsys.readouterr().err
    for step, mode in enumerate(("auto", "resume"), start=1):
        with stopped_after(step):
            assert trial.run(recover_mode=mode) == 143
    assert trial.steps() == [1, 2]


def test_only_the_same_run_is_continued(whole, tmp_path, capsys):
    trial = another(whole, "same")
    with stopped_after(1):
        assert trial.run() == 143
    before = contents(trial.folder("recover"))
    # Rows of other words, with the same ids and as many tokens: each answer's words in another order.
    rows = [json.loads(line) for line in whole.given.train.read_text().splitlines()]
    turned = [row | {"answer": " " + " ".join(row["answer"].split()[::-1])} for row in rows]
    other_rows = write_jsonl(tmp_path / "rows.jsonl", turned)
    other_model = shutil.copytree(whole.given.language_model, tmp_path / "model")
    edit_tensors(other_model, lambda tensors: {name: np.nextafter(x, 9) for name, x in tensors.items()})
    for changes, message in (
        ({"seed": 2}, "another seed (1 there, 2 here)"),
        ({"dataset__max_seqlen": 31}, "another dataset.max_seqlen (32 there, 31 here)"),
        ({"dataset__train_path": other_rows}, "another set of training data;"),
        ({"model__path": other_model}, "another model of role default;"),
    ):
        assert trial.run(**changes) == 2
        error = capsys.readouterr().err
        assert "realjax: error: recover: the save in" in error and f"was made with {message}" in error, error
    assert trial.steps() == [1] and contents(trial.folder("recover")) == before
    # A copy elsewhere is the same, and where nothing but the rate changed, it is said.
    copy = shutil.copytree(whole.given.language_model, tmp_path / "copy")
    with stopped_after(2):
        assert trial.run(model__path=copy, model__optimizer__lr=0.005) == 143
    output = capsys.readouterr().out
    assert "with no effect on the result: model.path " in output
    assert "with effect from here on: model.optimizer.lr 0.01 -> 0.005" in output
    assert "learning rate of the last step before and of the first one now: lr " in output
