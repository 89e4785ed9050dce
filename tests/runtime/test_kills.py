"""Killed at any moment and continued, a run leaves what an uninterrupted one leaves."""

import json
import random
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from realjax.dataflow.run import Frequency, RolloutEvaluation, RunPaths, RunSpec
from realjax.record.samples import Sample
from realjax.runtime import session
from tests.given.checkpoints import write_llama
from tests.given.compare import without_clocks
from tests.given.sequences import make_loader
from tests.given.specs import make_paths, make_spec, run_here
from tests.runtime.kills import Killed, watching

VALUES = (0.0, 0.1, 0.3, 0.2, 0.5, 0.4, 0.45)  # of the evaluation after each step: the best is that of step 4
NUM_KILLS = 5
STEPS = 6


def evaluate(executor, evaluation, loader, decode_fn) -> tuple[Mapping[str, float], list[Sample]]:
    """Stands in for answers: what they are worth follows from the number of updates."""
    step = int(executor.states["default"].num_updates)
    return {"greedy/worth": VALUES[step]}, [Sample(variant="greedy", prompt="p", answer=f"after {step}", reward=1.0)]


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunSpec:
    write_llama(tmp_path / "model")
    monkeypatch.setattr(session, "evaluate_rollouts", evaluate)
    held_out = RolloutEvaluation(role="default", variants={}, loader=make_loader(in_order=True))
    return make_spec(
        make_paths(tmp_path),
        loader=make_loader(num_epochs=2),
        num_epochs=2,
        evaluations={"": held_out},
        best_metric="greedy/worth",
        evaluate=Frequency(steps=1),
        save=Frequency(steps=2),
        recover_mode="auto",
    )


def read(paths: RunPaths) -> dict[str, object]:
    """Returns the names of all that a run left, and what is in those that do not depend on a clock."""
    found: dict[str, object] = {}
    for root in (paths.checkpoints, paths.recover):
        for path in root.rglob("*"):
            name = f"{root.parent.name}/{path.relative_to(root)}"
            if root == paths.checkpoints:
                found[name] = path.read_bytes() if path.is_file() else None
            elif len(path.relative_to(root).parts) <= 2:
                found[name] = None
    for name in ("metrics.jsonl", "samples.jsonl"):
        records = [json.loads(line) for line in (paths.logs / name).read_text().splitlines()]
        kept = without_clocks(records)
        found[name] = [{k: v for k, v in r.items() if k.partition("/")[0] not in ("memory_mib",)} for r in kept]
    # cluster.json comes of steps that compiled nothing: a run that goes on after the last one writes none.
    found |= {path.name: None for path in paths.logs.glob("*.*") if path.stem not in ("run", "cluster", "cluster.json")}
    report = (paths.logs / "report.html").read_text()
    return found | {"first samples": "after step 0" in report and "after 0" in report}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # what is killed closes nothing
@pytest.mark.filterwarnings(
    "ignore:.*Event loop is closed|Exception ignored in:pytest.PytestUnraisableExceptionWarning"
)
def test_a_run_killed_before_any_effect_on_files_ends_like_one_that_was_not(spec, tmp_path):
    paths = [make_paths(tmp_path / name) for name in ("whole", "killed")]
    roles = {"default": replace(spec.roles["default"], path=tmp_path / "model")}
    whole, killed = (replace(spec, paths=one, roles=roles) for one in paths)
    with watching(tmp_path / "whole") as watch:
        assert run_here(whole) == 0
    expected = read(whole.paths)
    assert [name for name in expected if "best" in name and name.count("/") == 2] == [
        "checkpoints/default/best-globalstep4"
    ]
    moves = [i for i, effect in enumerate(watch.seen) if effect.split()[0] in ("replace", "rename", "rmtree")]
    seed = random.SystemRandom().randrange(10**6)
    draw = random.Random(seed)
    chosen = {*draw.sample(moves, NUM_KILLS), *draw.sample(range(len(watch.seen)), NUM_KILLS)}
    num_killed = 0
    for number in chosen:
        one = replace(killed, paths=make_paths(tmp_path / f"killed-{number}"))
        print(f"seed {seed}: killed before effect {number}, about {watch.seen[number]}")
        # Threads take turns as they like: a run that makes an effect fewer is not killed before the last.
        with suppress(Killed), watching(tmp_path / f"killed-{number}", last=number) as stopped:
            run_here(one)
        num_killed += len(stopped.seen) == number
        assert run_here(one) == 0
        found = read(one.paths)
        assert found.keys() == expected.keys()
        assert [name for name in found if found[name] != expected[name]] == []
    assert num_killed >= NUM_KILLS
