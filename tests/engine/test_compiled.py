import logging
import re

import jax
import numpy as np
import pytest

from realjax.algorithms.ppo import PPOParameters, make_advantages
from realjax.core.axes import train_rules
from realjax.core.batch import BATCH_DIMS, Batch
from realjax.engine.compiled import Compiled, CompileLog, place_batch
from realjax.runtime.rollouts import list_targets
from tests.algorithms.pair_cases import Spread, make_pairs
from tests.algorithms.rollout_cases import Packing, Rollout, host_arrays, make_rollouts
from tests.given.models import make_layout
from tests.given.sequences import make_examples, pack_in_order


def make_batch(num_rows: int, row_len: int = 6) -> Batch:
    tokens = np.arange(num_rows * row_len).reshape(num_rows, row_len)
    return Batch.of(tokens=tokens, loss_mask=tokens % 2 == 0, rewards=np.ones((num_rows, 3)))


def test_each_shape_compiles_once_and_is_told(caplog):
    log, traced = CompileLog(), []

    def double(x, batch):
        traced.append(batch["tokens"].shape)
        return 2 * x + batch["tokens"].sum()

    fn = Compiled("double", double, log)
    on = lambda num_rows: jax.device_put(make_batch(num_rows))
    with caplog.at_level(logging.INFO, "realjax.engine"):
        for num_rows in (2, 4, 2, 4, 2):
            expected = 2 + sum(range(6 * num_rows))
            assert fn(jax.numpy.int32(1), on(num_rows)) == expected
    assert traced == [(2, 6), (4, 6)]
    assert [entry[:2] for entry in log.entries] == [("double", "[2, 6]"), ("double", "[4, 6]")]
    assert log.seconds == sum(entry[2] for entry in log.entries) > 0
    assert [record.getMessage().partition(" in ")[0] for record in caplog.records] == [
        "compiled double for rows [2, 6]",
        "compiled double for rows [4, 6]",
    ]
    assert re.search(r"rows \[4, 6\] in [\d.]+ s, again: rows \[2, 6\] so far \(program 2 of this run\)", caplog.text)


def test_another_dtype_or_placement_is_another_program_and_said(caplog):
    log = CompileLog()
    fn = Compiled("copy", lambda x: x + 1, log)
    x = jax.numpy.ones(8)
    layout = make_layout(dp=8)
    with caplog.at_level(logging.INFO, "realjax.engine"):
        for argument in (x, x.astype(jax.numpy.bfloat16), jax.device_put(x, layout.sharding("data")), x):
            fn(argument)
    assert "again: an argument of bfloat16[8], float32[8] so far" in caplog.text
    assert len(log.entries) == 3
    assert fn(jax.device_put(x, layout.sharding("data"))).sharding.is_equivalent_to(layout.sharding("data"), 1)


def test_a_log_counts_the_programs_of_several_functions():
    log = CompileLog()
    one, two = Compiled("one", lambda x: x, log), Compiled("two", lambda x: -x, log)
    one(jax.numpy.ones(2)), two(jax.numpy.ones(2)), one(jax.numpy.ones(2))
    assert [entry[0] for entry in log.entries] == ["one", "two"]


@pytest.mark.parametrize("layout", [{}, {"dp": 4}, {"dp": 2, "tp": 2, "sp": True}], ids=str)
def test_rows_are_split_over_data_and_nothing_is_lost(layout):
    layout, batch = make_layout(**layout), make_batch(8)
    placed = place_batch(batch, train_rules(layout.strategy), layout)
    assert placed.keys() == batch.keys()
    for key in batch:
        np.testing.assert_array_equal(placed[key], batch[key])
        assert placed[key].sharding.is_equivalent_to(layout.sharding("data"), 2)


def test_rows_that_do_not_divide_are_refused_by_key():
    layout = make_layout(dp=4)
    message = r"batch key 'loss_mask': dim 0 \('rows'\) of size 6 does not divide over mesh axis 'data' of size 4"
    with pytest.raises(ValueError, match=message):
        place_batch(make_batch(6), train_rules(layout.strategy), layout)


# What the design says of a key's second dim; `kept` and `routes` have a third.
NOT_OF_TIME = {
    "segments": {
        "rewards",
        "has_eos",
        "group",
        "is_baseline",
        "seq_share",
        "prompt_id",
        "sample_id",
        "env_failed",
        "is_failed",
        "text_rewards",
        "num_turns",
        "num_retries",
        "reward_terms",
    },
    "pairs": {"pair_weight", "desirable", "is_other", "kl_baseline"},
    "targets": {"targets"},
}


def learn(batch: Batch) -> Batch:
    """Returns a batch of rollouts with what PPO's host call adds and the tokens that are asked for."""
    batch = batch.with_arrays(**make_advantages(PPOParameters())(host_arrays(batch), {}).arrays)
    targets = list_targets(batch["train_mask"], batch["positions"])
    assert targets is not None
    return batch.with_arrays(targets=targets, correction=batch["advantages"])


def full(rollout: Rollout, number: int) -> Rollout:
    """Returns a rollout with every key that a generate call and a reward model add."""
    kept = np.ones((len(rollout["tokens"]), 5), np.int32)
    return rollout | {
        "prompt_id": np.int32(number),
        "sample_id": np.int32(0),
        "kept": kept,
        "routes": kept,
        "scores": rollout["values"],
        "token_age": np.zeros(len(rollout["tokens"]), np.int32),
        "env_failed": np.array(False),
        "is_failed": np.array(False),
        "turn_rewards": rollout["values"],
        "num_turns": np.int32(1),
        "num_retries": np.int32(0),
        "text_rewards": np.full(1, rollout["rewards"]),
        "reward_terms": np.full(2, rollout["rewards"]),
    }


def make_batches() -> dict[str, Batch]:
    """Returns a batch of each experiment with all keys that it ever has."""
    paired = Spread(row_len=72, num_rows=8).pack(make_pairs())
    rollouts = [full(rollout, number) for number, rollout in enumerate(make_rollouts())]
    choices = np.zeros((*paired["tokens"].shape, 3))
    return {
        "sft": pack_in_order(make_examples([5, 9, 7, 4]), 10, num_rows=4)[0],
        "rw": paired,
        "dpo": paired.with_arrays(ref_logprobs=np.zeros(paired["tokens"].shape)),
        "kto": paired.with_arrays(
            desirable=paired["pair_weight"], is_other=paired["pair_weight"] > 0, kl_baseline=paired["pair_weight"]
        ),
        "distill": paired.with_arrays(teacher_ids=choices.astype(np.int32), teacher_logprobs=choices),
        "ppo": learn(Packing(row_len=40, num_rows=4).pack(rollouts)[0]),
    }


def test_time_split_over_a_mesh_axis_splits_what_is_of_time_and_nothing_else():
    """A new axis is a line of the table, whatever the experiment: every key knows which of its dims are of time."""
    layout = make_layout(dp=2, tp=2)
    rules, seen = {**train_rules(layout.strategy), "time": "tensor"}, set()
    for experiment, batch in make_batches().items():
        for key, array in place_batch(batch, rules, layout).arrays.items():
            is_of_time = not any(key in keys for keys in NOT_OF_TIME.values())
            expected = layout.sharding("data", "tensor" if is_of_time else None)
            assert array.sharding.is_equivalent_to(expected, array.ndim), (experiment, key)
            np.testing.assert_array_equal(array, batch[key])
        seen |= set(batch)
    assert seen == set(BATCH_DIMS)  # a key that is added is to be added here
