"""What a run refuses, before it touches an earlier one's files, and what it does not save."""

import logging
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from realjax.algorithms.sft import SFT_LOSS
from realjax.core.loss import Loss
from realjax.core.optimizer_config import OptimizerConfig
from realjax.dataflow.graph import DataflowGraph
from realjax.dataflow.run import Frequency, RunSpec
from realjax.record.metrics import read_metrics
from realjax.runtime.lock import lock_run
from realjax.runtime.session import Session, Taken
from tests.given.checkpoints import write_llama
from tests.given.commands import stopped_after
from tests.given.sequences import make_loader
from tests.given.specs import NO_IDENTITY, TRAIN, make_paths, make_spec, run_here

SAME = replace(NO_IDENTITY, fixed={"seed": 1}, steering={"model.optimizer.lr": 0.01})


@pytest.fixture
def spec(tmp_path: Path) -> RunSpec:
    write_llama(tmp_path / "model")
    return make_spec(make_paths(tmp_path), save=Frequency(steps=1), recover_mode="auto", identity=SAME)


def contents(spec: RunSpec) -> dict[str, bytes]:
    """Returns all files of the run but the lock, which tells of every start."""
    files = (path for path in spec.paths.logs.parents[1].rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path): path.read_bytes() for path in files}


def test_a_finished_run_answers_itself_alone(spec, caplog):
    assert run_here(spec) == 0
    before = contents(spec)
    with caplog.at_level(logging.INFO, "realjax"):
        assert run_here(replace(spec, identity=replace(SAME, harmless={"n_gpus_per_node": 1}))) == 0
    assert "all 3 steps were done before" in caplog.text
    with pytest.raises(ValueError, match=r"was made with another seed \(1 there, 2 here\); continue with the same"):
        run_here(replace(spec, identity=replace(SAME, fixed={"seed": 2})))
    with pytest.raises(ValueError, match=r"model.optimizer.lr 0.01 -> 0.5 would have no effect; raise total_train_epo"):
        run_here(replace(spec, identity=replace(SAME, steering={"model.optimizer.lr": 0.5})))
    assert contents(spec) == before


def test_a_benchmark_saves_nothing_and_says_so(spec, caplog):
    with caplog.at_level(logging.INFO, "realjax"):
        assert run_here(replace(spec, benchmark_steps=2)) == 0
    assert "benchmark_steps: neither checkpoints nor training states are written" in caplog.text
    assert len(read_metrics(spec.paths.logs / "metrics.jsonl")) == 2
    assert not list(spec.paths.checkpoints.iterdir()) and not list(spec.paths.recover.iterdir())


def test_what_is_found_while_loading_leaves_the_earlier_run_where_it_is(spec, tmp_path):
    anew = replace(spec, recover_mode="disabled")
    assert run_here(anew) == 0
    before = contents(spec)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    del tensors["model.norm.weight"]
    (tmp_path / "broken").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "broken" / name).write_bytes((tmp_path / "model" / name).read_bytes())
    save_file(tensors, tmp_path / "broken" / "model.safetensors")
    broken = replace(spec.roles["default"], path=tmp_path / "broken")
    with pytest.raises(ValueError, match="model.norm.weight"):
        run_here(replace(anew, roles={"default": broken}))
    (tmp_path / "broken").rename(tmp_path / "model" / "aside")
    found = {name: content for name, content in contents(spec).items() if "aside" not in name and "broken" not in name}
    assert found == before


def test_a_second_run_of_a_name_is_refused_before_it_moves_anything(spec):
    assert run_here(spec) == 0
    before = contents(spec)
    with lock_run(spec.paths.logs), pytest.raises(ValueError, match="another run of this name is going on"):
        run_here(replace(spec, recover_mode="disabled"))
    assert contents(spec) == before


def test_numbers_that_are_not_finite_are_neither_saved_nor_exported(spec, monkeypatch):
    record = Session.record

    def record_and_spoil(session: Session, taken: Taken) -> None:
        record(session, taken)
        if taken.step == 1:
            state = session.executor.states["default"]
            spoiled = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), state.params)
            session.executor.states["default"] = state.replace(params=spoiled)

    monkeypatch.setattr(Session, "record", record_and_spoil)
    with pytest.raises(RuntimeError, match=r"step 2: default holds numbers that are not finite, .*; step 1 is in "):
        run_here(spec)
    assert [path.name for path in spec.paths.recover.iterdir()] == ["1"]
    assert [path.name for path in (spec.paths.checkpoints / "default").iterdir()] == ["epoch1epochstep1globalstep1"]
    monkeypatch.setattr(Session, "record", record)
    assert run_here(spec) == 0


def test_a_run_whose_last_updates_were_skipped_does_not_end_well(spec, tmp_path, caplog):
    def nothing(outputs, batch):
        sums = SFT_LOSS.fn(outputs, batch)
        return replace(sums, loss=replace(sums.loss, sum=sums.loss.sum * jnp.nan))

    train = replace(TRAIN, loss=Loss(head=SFT_LOSS.head, fn=nothing))
    stalled = replace(spec, graph=DataflowGraph((train,), frozenset({"tokens", "loss_mask"})))
    for _ in range(2):  # and says the same when it is asked again
        caplog.clear()
        assert run_here(stalled) == 1
        assert "default: the last 3 updates were skipped, as their gradients were not finite" in caplog.text
    (saved,) = (spec.paths.checkpoints / "default").glob("*globalstep3")
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", saved))
    assert all(np.array_equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("schedule_epochs", [None, 1])
def test_more_epochs_say_what_the_learning_rate_does_and_may_keep_the_old_schedule(schedule_epochs, spec, caplog):
    optimizer = OptimizerConfig(lr=0.01, lr_scheduler_type="linear", warmup_steps_proportion=0, min_lr_ratio=0.1)
    first = replace(spec, roles={"default": replace(spec.roles["default"], optimizer=optimizer)})
    assert run_here(replace(first, identity=replace(SAME, steering={"exp_ctrl.total_train_epochs": 1}))) == 0
    longer = replace(
        first,
        loader=make_loader(num_epochs=2),
        num_epochs=2,
        schedule_epochs=schedule_epochs,
        identity=replace(SAME, steering={"exp_ctrl.total_train_epochs": 2}),
    )
    with caplog.at_level(logging.INFO, "realjax"), stopped_after(4):
        assert run_here(longer) == 143
    assert "with effect from here on: exp_ctrl.total_train_epochs 1 -> 2" in caplog.text
    assert ("lr_schedule_epochs=1 keeps to that of before, at its floor" in caplog.text) == (schedule_epochs is None)
    rates = [record["lr"] for record in read_metrics(spec.paths.logs / "metrics.jsonl")]
    np.testing.assert_allclose(rates[:3], [0.01, 0.007, 0.004], rtol=1e-5)
    expected = 0.001 if schedule_epochs else 0.0055  # half of the way from 0.01 to 0.001
    assert rates[3] == pytest.approx(expected, rel=1e-5)
    assert f"learning rate of the last step before and of the first one now: lr 0.004 -> {expected:.3g}" in caplog.text
