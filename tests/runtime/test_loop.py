"""A run of two roles, of which one is never trained: what is evaluated, saved, exported and continued."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from realjax.algorithms.sft import SFT_LOSS
from realjax.data.loader import Position
from realjax.dataflow.graph import DataflowGraph, Inference
from realjax.dataflow.run import Evaluation, Frequency, RunSpec
from realjax.hf.files import CheckpointFiles
from realjax.record.metrics import read_metrics
from realjax.runtime.executor import Executor
from realjax.runtime.exports import checkpoint_name
from realjax.runtime.session import Session
from tests.given.checkpoints import write_llama
from tests.given.commands import stopped_after
from tests.given.sequences import make_loader
from tests.given.specs import TRAIN, make_paths, make_role_spec, make_spec, run_here

REFERENCE = Inference(name="ref", role="ref", inputs=("tokens",), outputs=("logprobs",), head="logprobs")


@pytest.fixture
def spec(tmp_path: Path) -> RunSpec:
    paths = make_paths(tmp_path)
    write_llama(tmp_path / "model")
    held_out = Evaluation(role="default", loss=SFT_LOSS, loader=make_loader(in_order=True))
    return make_spec(
        paths,
        graph=DataflowGraph((TRAIN, REFERENCE), frozenset({"tokens", "loss_mask"})),
        roles=make_spec(paths).roles | {"ref": make_role_spec("ref", tmp_path / "model")},
        evaluations={"": held_out},
        evaluate=Frequency(steps=2),
        save=Frequency(steps=2),
        recover_mode="auto",
    )


def test_only_trained_roles_are_saved_and_a_run_goes_on_where_it_stopped(spec):
    with stopped_after(2):
        assert run_here(spec) == 143
    exports = spec.paths.checkpoints
    assert [path.name for path in exports.iterdir()] == ["default"]
    assert [path.name for path in (exports / "default").iterdir()] == ["epoch1epochstep2globalstep2"]
    assert {path.name for path in (spec.paths.recover / "2").iterdir()} >= {"run", "role_default"}
    assert not (spec.paths.recover / "2" / "role_ref").exists()
    assert run_here(spec) == 0
    records = [(record["kind"], record["step"]) for record in read_metrics(spec.paths.logs / "metrics.jsonl")]
    assert records == [("eval", 0), ("train", 1), ("train", 2), ("eval", 2), ("train", 3)]
    exported = exports / "default" / "epoch1epochstep3globalstep3"
    assert {tensor.dtype for tensor in CheckpointFiles.open(exported).tensors.values()} == {"F32"}


LATE = "take 0, record 0, take 1, record 1, take 2, take 3, record 2, record 3"
AT_ONCE = "take 0, record 0, take 1, record 1, take 2, record 2, take 3, record 3"


@pytest.mark.parametrize(("num_calls", "expected"), [(1, LATE), (2, AT_ONCE)])
def test_metrics_of_a_single_call_wait_until_the_next_step_is_on_the_devices(num_calls, expected, spec, monkeypatch):
    """But not those of the steps that compile, the first and the second, and of the last."""
    events: list[str] = []
    for owner, name, what in ((Executor, "step", "take"), (Session, "record", "record")):
        monkeypatch.setattr(owner, name, note(getattr(owner, name), what, events))
    graph = DataflowGraph(spec.graph.calls[:num_calls], spec.graph.dataset_keys)
    changes = {
        "graph": graph,
        "roles": {name: role for name, role in spec.roles.items() if name in graph.roles},
        "loader": make_loader(num_epochs=2),
        "num_epochs": 2,
        "evaluate": Frequency(),
        "evaluations": {},
    }
    assert run_here(replace(spec, benchmark_steps=4, **changes)) == 0
    assert ", ".join(events) == expected
    records = read_metrics(spec.paths.logs / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    # The clocks are read by two threads.
    assert all(0 < record["time/train"] < record["seconds"] + 0.1 for record in records)


def note(function: Callable[..., Any], what: str, events: list[str]) -> Callable[..., Any]:
    """Returns the method, which notes each call and its step."""

    def noted(owner: object, *args: Any) -> Any:
        events.append(f"{what} {args[0].step if what == 'record' else args[1]}")
        return function(owner, *args)

    return noted


def test_a_model_from_scratch_needs_no_weights_and_depends_on_the_seed(spec, tmp_path):
    (tmp_path / "model" / "model.safetensors").unlink()
    scratch = {name: replace(role, init_from_scratch=True) for name, role in spec.roles.items()}
    losses = []
    for seed in (1, 1, 2):
        paths = make_paths(tmp_path / str(len(losses)))
        changed = replace(spec, paths=paths, roles=scratch, seed=seed, benchmark_steps=1)
        assert run_here(changed) == 0
        losses.append(read_metrics(paths.logs / "metrics.jsonl")[0]["loss"])
    assert losses[0] == losses[1] != losses[2]
    assert np.isfinite(losses).all()


def test_a_checkpoint_has_reals_name():
    position = Position(epoch=3, epoch_step=4, global_step=20, ends_epoch=False)
    assert checkpoint_name(position) == "epoch3epochstep4globalstep20"
