import numpy as np
import pytest

from realjax.core.batch import is_per_token
from realjax.data.packing import PART_LENS, bucket_len, pack, pack_rows, unpack


def random_lengths(seed: int) -> tuple[list[int], int]:
    rng = np.random.default_rng(seed)
    row_len = int(rng.integers(1, 100))
    return rng.integers(1, row_len + 1, size=rng.integers(1, 200)).tolist(), row_len


def make_examples(lengths):
    rng = np.random.default_rng(0)
    return [
        {
            "tokens": rng.integers(1, 1000, size=length, dtype=np.int32),
            "loss_mask": rng.random(length) < 0.5,
            "kept": rng.integers(0, 9, size=(length, 3), dtype=np.int32),
            "rewards": np.float32(rng.random()),
        }
        for length in lengths
    ]


@pytest.mark.parametrize("seed", range(20))
def test_unpack_is_the_inverse_of_pack(seed):
    lengths, row_len = random_lengths(seed)
    plan = pack_rows(lengths, row_len, num_shards=1 + seed % 4)
    examples = make_examples(lengths)
    batch = pack(examples, plan, num_rows=len(plan.rows) + seed % 3)
    for (index, *_), sequence in zip(plan.places(), unpack(batch), strict=True):
        assert sequence.keys() == examples[index].keys()
        for key, value in examples[index].items():
            np.testing.assert_array_equal(sequence[key], value)
            assert sequence[key].dtype == value.dtype


@pytest.mark.parametrize("seed", range(20))
def test_every_sequence_has_its_own_slots_and_positions_restart(seed):
    lengths, row_len = random_lengths(seed)
    plan = pack_rows(lengths, row_len)
    assert sorted(i for row in plan.rows for i in row) == list(range(len(lengths)))
    batch = pack(make_examples(lengths), plan)
    segment_ids, positions = batch["segment_ids"], batch["positions"]
    assert batch.num_tokens == sum(lengths)
    assert (segment_ids.max(axis=1) == [len(row) for row in plan.rows]).all()
    for row, members in enumerate(plan.rows):
        expected = np.concatenate([np.arange(lengths[i]) for i in members])
        np.testing.assert_array_equal(positions[row, : len(expected)], expected)
        np.testing.assert_array_equal(segment_ids[row, : len(expected)], np.cumsum(expected == 0))
    for key in filter(is_per_token, batch):
        assert not batch[key][segment_ids == 0].any()


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_few_and_the_plan_is_deterministic(seed):
    lengths, row_len = random_lengths(seed)
    plan = pack_rows(lengths, row_len)
    assert plan == pack_rows(np.array(lengths), row_len)
    loads = sorted(sum(lengths[i] for i in row) for row in plan.rows)
    assert loads[-1] <= row_len
    # No two rows would fit in one: what any-fit packing promises.
    assert len(loads) < 2 or loads[0] + loads[1] > row_len


@pytest.mark.parametrize("num_shards", [2, 4, 8])
def test_shards_hold_nearly_equal_tokens(num_shards):
    lengths = np.random.default_rng(num_shards).integers(5, 250, size=301).tolist()
    fewest = len(pack_rows(lengths, 256).rows)
    for num_rows in (None, (fewest // num_shards + 5) * num_shards):
        plan = pack_rows(lengths, 256, num_rows=num_rows, num_shards=num_shards)
        assert len(plan.rows) % num_shards == 0
        loads = np.array([sum(lengths[i] for i in row) for row in plan.rows]).reshape(num_shards, -1).sum(axis=1)
        assert loads.max() - loads.min() <= 256


def test_buckets_grow_with_the_length_and_waste_at_most_a_third():
    buckets = [bucket_len(n) for n in range(1, 5000)]
    assert buckets == sorted(buckets)
    assert all(n <= bucket for n, bucket in enumerate(buckets, start=1))
    assert all(bucket < max(n + 32, 1.5 * n) for n, bucket in enumerate(buckets, start=1))
    assert sorted(set(buckets))[:9] == [32, 64, 96, 128, 192, 256, 384, 512, 768]
    assert all(bucket_len(bucket) == bucket for bucket in buckets)
    assert bucket_len(65, buckets=[128, 64, 100]) == 100


def test_what_does_not_fit_is_refused():
    plan = pack_rows([3, 2], 4)
    examples = make_examples([3, 2])
    for call, message in [
        (lambda: pack_rows([3, 5], 4), "sequence 1 has 5 tokens; needed 1 to 4"),
        (lambda: pack_rows([0], 4), "sequence 0 has 0 tokens"),
        (lambda: pack_rows([3, 2], 4, num_rows=1), "fill 2 rows of 4; found 1"),
        (lambda: pack_rows([3, 2], 4, num_rows=3, num_shards=2), "3 rows do not divide over 2"),
        (lambda: pack(examples[:1], plan), "found 1 examples for a plan of 2"),
        (lambda: pack(examples, plan, num_rows=1), "found 1 rows"),
        (lambda: pack(examples, plan, num_segments=0), "2 rows of 0 segments; needed at least 2 rows of 1"),
        (lambda: pack([example | {"other": 1} for example in examples], plan), "key 'other' have no names"),
        (lambda: pack([example | {"rewards": np.zeros(2)} for example in examples], plan), "needed one for the"),
        (lambda: pack([example | {"kept": example["tokens"]} for example in examples], plan), "'kept' of example 0"),
        (lambda: pack(examples[::-1], plan), "'tokens' of example 0 has shape"),
        (lambda: pack([examples[0], {"tokens": examples[1]["tokens"]}], plan), r"example 1 has keys \['tokens'\]"),
        (lambda: bucket_len(0), "at least 1"),
        (lambda: bucket_len(9, buckets=[4, 8]), "more than the largest bucket"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_each_sequence_of_an_example_has_its_own_number():
    """Of keys with dim `segments`; unpacked, every sequence has what belongs to it."""
    lens = [(3, 2), (4, 1), (2, 2)]
    examples = [
        {
            "tokens": np.full(sum(both), 10 * i + 5, np.int32),
            "rewards": np.array([10 * i, 10 * i + 1], np.float32),
            "pair_weight": np.float32(i),
            PART_LENS: np.array(both),
        }
        for i, both in enumerate(lens)
    ]
    plan = pack_rows([sum(both) for both in lens], 10)
    batch = pack(examples, plan)
    assert batch["rewards"].shape == (2, 4) and batch["pair_weight"].shape == (2, 2)
    sequences = unpack(batch.select(("tokens", "segment_ids", "positions", "rewards")))
    assert [float(one["rewards"]) for one in sequences] == [
        10 * i + part for row in plan.rows for i in row for part in (0, 1)
    ]
    assert all(int(one["tokens"][0]) == float(one["rewards"]) // 10 * 10 + 5 for one in sequences)
    with pytest.raises(ValueError, match="'rewards' of example 0 has shape .*; needed one for each of its sequences"):
        pack([examples[0] | {"rewards": np.float32(1)}, *examples[1:]], plan)
