import logging

import jax
import numpy as np
import pytest

from realjax.core.axes import train_rules
from realjax.core.batch import Batch
from realjax.engine.compiled import Compiled, CompileLog, place_batch
from tests.builders import make_layout


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
    assert [record.getMessage().split(" s ")[0].rsplit(" ", 1)[0] for record in caplog.records] == [
        "compiled double for rows [2, 6] in",
        "compiled double for rows [4, 6] in",
    ]
    assert "(program 2 of this run)" in caplog.text


def test_another_dtype_or_placement_is_another_program():
    log = CompileLog()
    fn = Compiled("copy", lambda x: x + 1, log)
    x = jax.numpy.ones(8)
    layout = make_layout(dp=8)
    for argument in (x, x.astype(jax.numpy.bfloat16), jax.device_put(x, layout.sharding("data")), x):
        fn(argument)
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
