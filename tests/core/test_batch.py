import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.core.batch import Batch


def make_batch() -> Batch:
    segment_ids = np.array([[1, 1, 2, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    return Batch.of(tokens=np.arange(12).reshape(3, 4), segment_ids=segment_ids, rewards=np.zeros((3, 2)))


def test_host_arrays_take_the_conventional_dtypes():
    batch = make_batch().with_arrays(loss_mask=np.ones((3, 4), bool), positions=np.ones((3, 4), np.int8))
    assert {key: batch[key].dtype.name for key in batch} == {
        "loss_mask": "bool",
        "positions": "int32",
        "rewards": "float32",
        "segment_ids": "int32",
        "tokens": "int32",
    }


def test_sizes_are_rows_width_and_real_tokens():
    batch = make_batch()
    assert (batch.num_rows, batch.row_len, batch.num_tokens) == (3, 4, 4)


def test_counting_tokens_refuses_to_wait_for_a_device():
    with pytest.raises(ValueError, match="needs host arrays"):
        _ = jax.device_put(make_batch()).num_tokens


def test_a_batch_passes_through_jit_with_its_keys():
    batch = make_batch()
    doubled = jax.jit(lambda b: b.with_arrays(scores=b["tokens"] * 2).select(["tokens", "scores"]))(batch)
    assert doubled.keys() == ("scores", "tokens")
    np.testing.assert_array_equal(doubled["scores"], 2 * batch["tokens"])


def test_key_order_does_not_change_the_tree_structure():
    one = Batch.of(values=np.zeros((2, 3)), scores=np.ones((2, 3)))
    other = Batch.of(scores=np.ones((2, 3)), values=np.zeros((2, 3)))
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))


def test_with_arrays_adds_but_never_changes():
    batch = make_batch()
    grown = batch.with_arrays(values=jnp.ones((3, 4)), tokens=batch["tokens"])
    assert "values" in grown and "values" not in batch
    assert grown["tokens"] is batch["tokens"]
    with pytest.raises(ValueError, match="'tokens' is there already"):
        batch.with_arrays(tokens=batch["tokens"].copy())


def test_rows_slices_every_array():
    part = make_batch().rows(slice(1, 3))
    assert part.num_rows == 2
    np.testing.assert_array_equal(part["tokens"], np.arange(4, 12).reshape(2, 4))
    assert part["rewards"].shape == (2, 2)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "no array"),
        ({"tokens": [[1]], "values": [[1], [2]]}, r"'values' has shape \(2, 1\), 2 rows, but 'tokens' has 1 of them"),
        ({"values": [[1, 2]], "kept": [[[1], [1], [1]]]}, "'kept' has shape .*, 3 time, but 'values' has 2"),
        ({"group": [[1, 2]], "rewards": [[1]]}, "'rewards' has shape .*, 1 segments, but 'group' has 2"),
        ({"tokens": np.float32(1)}, r"'tokens' has shape \(\); its dims are rows, time"),
        ({"kept": [[1, 2]]}, r"'kept' has shape \(1, 2\); its dims are rows, time, kept"),
        ({"mine": [[1]]}, r"the dims of key 'mine' have no names; enter the key in BATCH_DIMS .* which has .*tokens"),
        ({"tokens": np.array([["x"]])}, "dtype <U1"),
        ({"tokens": np.array([[2**40]])}, "int32 is the widest"),
    ],
)
def test_arrays_that_make_no_batch_are_refused(arrays, message):
    with pytest.raises(ValueError, match=message):
        Batch.of(**arrays)


def test_dims_of_other_names_may_differ():
    batch = make_batch().with_arrays(targets=np.zeros((3, 5)), kept=np.zeros((3, 4, 7)), pair_weight=np.zeros((3, 1)))
    with pytest.raises(ValueError, match="'has_eos' has shape .*, 1 segments, but 'rewards' has 2"):
        batch.with_arrays(has_eos=np.zeros((3, 1)))


def test_a_missing_key_names_the_ones_there():
    with pytest.raises(ValueError, match="no key 'logprobs'; it holds rewards, segment_ids, tokens"):
        make_batch()["logprobs"]
