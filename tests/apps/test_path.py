"""From a command to its programs: what lies between, and what `--plan` shows of it without any of them."""

import inspect
from pathlib import Path

import jax
import pytest

import realjax
from realjax.apps import quickstart
from realjax.apps.quickstart import EXPERIMENTS
from realjax.engine import train
from tests.given.commands import Trial
from tests.given.runs import make_options

PACKAGE = str(Path(realjax.__file__).parent)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_plan_of_every_experiment_is_shown_and_nothing_is_done(experiment, given, tmp_path, capsys):
    options = make_options(experiment, given, tmp_path / "root", allocation_mode="d2p1m2", n_gpus_per_node=4)
    before = len(jax.live_arrays())
    assert quickstart.main([experiment, *(f"{name}={value}" for name, value in options.items()), "--plan"]) == 0
    shown = capsys.readouterr().out
    (call, *_) = EXPERIMENTS[experiment].build(quickstart.parse_overrides(
        EXPERIMENTS[experiment].config_cls, [f"{name}={value}" for name, value in options.items()]
    )).graph.mfcs  # fmt: skip
    (line,) = (line for line in shown.splitlines() if line.startswith(f"{call.name} "))
    assert "d2p1m2" in line and "on 0-3" in line
    assert len(jax.live_arrays()) == before
    assert {path.name for path in (tmp_path / "root").iterdir()} == {".cache"}  # of tokens


def test_a_layout_that_cannot_be_is_refused_by_the_plan_too(given, tmp_path, capsys):
    options = make_options("sft", given, tmp_path, allocation_mode="d1p4m1", n_gpus_per_node=4)
    assert quickstart.main(["sft", *(f"{name}={value}" for name, value in options.items()), "--plan"]) == 2
    assert "allocation: 4 pipeline stages, but default's model has 2 layers" in capsys.readouterr().err


def test_few_functions_lie_between_the_command_and_the_train_step(given, tmp_path, monkeypatch):
    stacks: list[list[str]] = []
    clip = train.clip_by_norm

    def note_stack(*args):
        frames = [frame.function for frame in reversed(inspect.stack()) if frame.filename.startswith(PACKAGE)]
        stacks.append(frames[: frames.index("step", frames.index("_compile"))])
        return clip(*args)

    monkeypatch.setattr(train, "clip_by_norm", note_stack)
    options = {"n_gpus_per_node": 1, "allocation_mode": "d1p1m1", "dataset.train_path": given.rows}
    trial = Trial(given=given, root=tmp_path, options=options)
    assert trial.run(benchmark_steps=1) == 0
    assert stacks[0] == ["main", "run_experiment", "run", "step", "run_call", "train", "__call__", "_compile"]
