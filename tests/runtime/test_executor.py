"""The executor carries keys from call to call, trains what is to be trained, and compiles each program once."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from realjax.algorithms.sft import SFT_LOSS
from realjax.core.axes import inference_rules
from realjax.core.batch import Batch
from realjax.core.host_call import HostResult
from realjax.core.layout import Layout, ParallelStrategy
from realjax.core.loss import Loss, LossSums
from realjax.core.metrics import Last, Total
from realjax.data.loader import Rows
from realjax.dataflow.graph import DataflowGraph, Host, Inference, MicroBatches, Minibatches, Train
from realjax.dataflow.run import Evaluation
from realjax.engine.compiled import place_batch
from realjax.engine.inference import make_inference
from realjax.runtime.calls import refuse_longer
from realjax.runtime.programs import num_micro_batches
from tests.given.compare import assert_bitwise_equal
from tests.given.models import make_layout, make_model, place_params, random_tree
from tests.given.sequences import make_examples, make_loader, pack_in_order
from tests.given.specs import GRAPH, TRAIN, make_executor, make_role, make_state

MODEL = make_model()
BATCH, _ = pack_in_order(make_examples([9, 12, 5, 14, 7, 3]), 16, num_rows=8)
HOST = {"tokens": np.ones((8, 16)), "segment_ids": np.ones((8, 16)), "positions": np.arange(16) + np.zeros((8, 1))}


def test_keys_travel_from_call_to_call():
    """A reference's log-probs, computed in one layout, are read by a training call in another."""

    def loss(outputs, batch: Batch) -> LossSums:
        sums = SFT_LOSS.fn(outputs, batch)
        return LossSums(sums.loss, {"reference": Total(batch["logprobs"].sum())})

    inference = Inference(name="refInf", role="ref", inputs=("tokens",), outputs=("logprobs",), head="logprobs")
    train = Train(
        name="train",
        role="default",
        inputs=("tokens", "loss_mask", "logprobs"),
        loss=Loss("nll", loss),
    )
    graph = DataflowGraph((train, inference), frozenset({"tokens", "loss_mask"}))
    layouts = {"refInf": make_layout(dp=2), "train": make_layout(dp=2, tp=2, zero=2)}
    roles = {
        "default": make_role(MODEL, layouts["train"]),
        "ref": make_role(MODEL, layouts["refInf"], "ref", is_trained=False),
    }
    reference = random_tree(MODEL, seed=5)
    states = {"default": make_state(roles["default"]), "ref": place_params(MODEL, reference, layouts["refInf"])}
    executor = make_executor(graph, layouts, roles, dict(states))
    before = jax.tree.map(np.asarray, executor.params("default"))

    metrics = executor.step(BATCH, 0).metrics
    assert list(metrics) == ["train"]
    layout = layouts["refInf"]
    alone = make_inference(MODEL, "logprobs", layout, roles["ref"].compute)
    batch = BATCH.select({"tokens", "segment_ids", "positions"})
    expected = np.asarray(
        jax.jit(alone)(states["ref"], place_batch(batch, inference_rules(layout.strategy), layout))["logprobs"]
    )
    np.testing.assert_allclose(float(metrics["train"][0]["reference"].value), expected.sum(), rtol=1e-5)
    assert_bitwise_equal(executor.params("ref"), reference)
    assert any(
        np.any(np.asarray(new) != old)
        for new, old in zip(jax.tree.leaves(executor.params("default")), jax.tree.leaves(before), strict=True)
    )
    executor.step(BATCH, 0)
    assert [name for name, _, _ in executor.compile_log.entries] == ["refInf", "train"]


def test_an_evaluation_changes_nothing_and_compiles_once():
    layout = make_layout(dp=2)
    role = make_role(MODEL, layout)
    executor = make_executor(GRAPH, {TRAIN.name: layout}, {"default": role}, {"default": make_state(role)})
    evaluation = Evaluation(role="default", loss=SFT_LOSS, loader=make_loader(rows=Rows(num_shards=2), in_order=True))
    before = jax.tree.map(np.asarray, executor.states["default"])
    sums = [executor.evaluate(evaluation, evaluation.loader.batch(i)) for i in range(evaluation.loader.total_steps)]
    weights = [float(part.loss.weight) for part in sums]
    assert weights == [int(evaluation.loader.batch(i)["loss_mask"].sum()) for i in range(len(sums))]
    again = executor.evaluate(evaluation, evaluation.loader.batch(0))
    assert float(again.loss.sum) == float(sums[0].loss.sum)
    assert [name for name, _, _ in executor.compile_log.entries] == ["evaluate"]
    after = jax.tree.map(np.asarray, executor.states["default"])
    assert all(map(np.array_equal, jax.tree.leaves(after), jax.tree.leaves(before)))


def test_updates_that_fall_away_count_for_the_schedule():
    """A step of three planned updates that has one sequence makes one: the next step's still begin with number 3."""
    layout = make_layout()
    role = make_role(MODEL, layout)
    train = replace(TRAIN, minibatches=Minibatches(count=3))
    graph = DataflowGraph((train,), frozenset({"tokens", "loss_mask"}))
    executor = make_executor(graph, {TRAIN.name: layout}, {"default": role}, {"default": make_state(role)})
    one_sequence, _ = pack_in_order(make_examples([9]), 16)
    rates = []
    for step, batch in enumerate([one_sequence, BATCH]):
        updates = executor.step(batch, step).metrics[TRAIN.name]
        rates += [float(update["lr"].value) for update in updates]
    assert role.spec.optimizer is not None
    assert rates == pytest.approx([float(role.spec.optimizer.learning_rate(number, 10)) for number in (0, 3, 4, 5)])
    assert int(executor.states["default"].num_updates) == 6


def test_an_evaluation_leaves_the_state_of_host_calls_as_it_is():
    """It reads what training left, and a call of training's name does not overwrite that."""

    def count(arrays, state) -> HostResult:
        seen = state.get("seen", 0.0) + 1
        return HostResult(arrays={}, state={"seen": seen}, metrics={"seen": Last(seen)})

    call = Host(name="rewards", fn=count, inputs=("loss_mask",), outputs=())
    layout, role = make_layout(), make_role(MODEL, make_layout())
    graph = DataflowGraph((TRAIN, call), frozenset({"tokens", "loss_mask"}))
    executor = make_executor(graph, {TRAIN.name: layout}, {"default": role}, {"default": make_state(role)})
    executor.step(BATCH, 0, [call])
    for _ in range(2):
        assert executor.step(BATCH, None, [call]).metrics["rewards"] == [{"seen": Last(2.0)}]
    assert executor.controls == {"rewards": {"seen": 1.0}}


@pytest.mark.parametrize("parts", [MicroBatches(count=4), MicroBatches(max_tokens=256)], ids=str)
def test_an_evaluation_in_micro_batches_has_the_same_sums_in_less_memory(parts):
    layout = make_layout(dp=2)
    role = make_role(MODEL, layout)
    executor = make_executor(GRAPH, {TRAIN.name: layout}, {"default": role}, {"default": make_state(role)})
    whole = Evaluation(role="default", loss=SFT_LOSS, loader=make_loader())
    batch, _ = pack_in_order(make_examples([16] * 64), 16)
    sums, scratch = [], []
    for evaluation in (whole, replace(whole, micro_batches=parts)):
        sums.append(jax.tree.map(float, executor.evaluate(evaluation, batch)))
        num_mbs = num_micro_batches(evaluation, batch, layout)
        (program,) = executor.programs.evaluation(evaluation, num_mbs).programs.values()
        scratch.append(program.memory_analysis().temp_size_in_bytes)
    assert jax.tree.leaves(sums[1]) == pytest.approx(jax.tree.leaves(sums[0]), rel=1e-6)
    assert scratch[1] < 0.6 * scratch[0]


@pytest.mark.parametrize("dp", [1, 2, 4])
@pytest.mark.parametrize("budget", [64, 65, 96, 127, 128, 1000])
def test_a_token_budget_gives_the_fewest_micro_batches_that_keep_it(dp, budget):
    batch, layout = Batch.of(**{key: np.tile(array, (3, 1)) for key, array in HOST.items()}), make_layout(dp=dp)
    mfc = replace(TRAIN, micro_batches=MicroBatches(max_tokens=budget))
    found = num_micro_batches(mfc, batch, layout)
    rows_per_device, tokens = batch.num_rows // dp, batch.num_rows * batch.row_len
    fitting = [n for n in range(1, rows_per_device + 1) if rows_per_device % n == 0 and tokens / n <= budget]
    assert found == min(fitting)


def test_micro_batches_that_cannot_be_are_refused():
    batch, layout = Batch.of(**HOST), make_layout(dp=2)

    def mfc(**parts) -> Train:
        return replace(TRAIN, micro_batches=MicroBatches(**parts))

    assert num_micro_batches(mfc(), batch, layout) == 1
    assert num_micro_batches(mfc(count=4), batch, layout) == 4
    with pytest.raises(ValueError, match=r"^train: 8 rows over dp=2 leave 4 a device, which n_mbs=3 does not divide"):
        num_micro_batches(mfc(count=3), batch, layout)
    assert num_micro_batches(mfc(max_tokens=32), batch, layout) == 4
    with pytest.raises(
        ValueError, match=r"^train: max_tokens_per_mb=31 is less than one row of 16 tokens .* at least 32"
    ):
        num_micro_batches(mfc(max_tokens=31), batch, layout)


def test_sequences_longer_than_a_call_was_told_are_refused():
    batch = Batch.of(**HOST)
    refuse_longer(batch, 16, "train")
    refuse_longer(batch, None, "train")
    with pytest.raises(ValueError, match="^train: a sequence of 16 tokens, but max_seqlen=15"):
        refuse_longer(batch, 15, "train")


def test_a_call_waits_for_those_it_reads_from_and_those_on_its_devices():
    devices = jax.devices()
    on = lambda *numbers: Layout(ParallelStrategy(dp=len(numbers)), tuple(devices[i] for i in numbers))
    layouts = {"gen": on(0, 1), "ref": on(2, 3), "rew": on(1, 2), "train": on(4, 5)}
    calls = tuple(
        Inference(name=name, role=name, inputs=inputs, outputs=outputs, head="logprobs")
        for name, inputs, outputs in (
            ("gen", ("tokens",), ("logprobs",)),
            ("ref", ("tokens",), ("ref_logprobs",)),
            ("rew", ("tokens",), ("rewards",)),
            ("train", ("logprobs", "rewards"), ()),
        )
    )
    executor = make_executor(DataflowGraph(calls, frozenset({"tokens"})), layouts, {}, {})
    found = {mfc.name: set(executor._waits_for(mfc)) for mfc in calls}
    assert found == {"gen": set(), "ref": set(), "rew": {"gen", "ref"}, "train": {"gen", "rew"}}


def test_no_device_holds_two_copies_of_parameters_at_once(monkeypatch):
    """A call waits for those whose copies lie on its devices, and for no others."""
    devices, call = jax.devices(), partial(Inference, role="ref", inputs=("tokens",), head="logprobs")
    layouts = {
        "one": Layout.of(ParallelStrategy(dp=2), devices[:2]),
        "other": Layout.of(ParallelStrategy(dp=2), devices[2:4]),
        "both": Layout.of(ParallelStrategy(dp=4), devices[:4]),
    }
    keys = ("logprobs", "ref_logprobs", "old_logprobs")
    calls = [call(name=name, outputs=(key,)) for name, key in zip(layouts, keys, strict=True)]
    graph = DataflowGraph(tuple(calls), frozenset({"tokens"}))
    role = make_role(MODEL, make_layout(tp=2), "ref", is_trained=False)
    states = {"ref": place_params(MODEL, random_tree(MODEL), role.home)}
    executor = make_executor(graph, layouts, {"ref": role}, states)
    executor.step(BATCH, 0)
    waits = []
    for each in graph.order:
        made = {id(results): name for name, results in executor._copies.items()}
        with monkeypatch.context() as patched:
            patched.setattr(jax, "block_until_ready", lambda x, made=made: waits.append(made.get(id(x))))
            executor.run_call(each, BATCH, 1)
    assert [name for name in waits if name] == ["both", "one", "other"]


def test_a_key_of_the_step_before_is_not_taken_from_this_one():
    count = Host(name="count", fn=lambda arrays, state: HostResult(arrays={}), inputs=("n",), outputs=("seen",))
    again = Host(name="again", fn=count.fn, inputs=("seen", "tokens"), outputs=("n",), delays={"seen": 1})
    graph = DataflowGraph((TRAIN, count, again), GRAPH.dataset_keys)
    layout, role = make_layout(), make_role(MODEL, make_layout())
    with pytest.raises(ValueError, match="^executor: again reads seen of the step before, .*: count itself waits"):
        make_executor(graph, {TRAIN.name: layout}, {"default": role}, {"default": make_state(role)})
