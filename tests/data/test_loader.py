from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest

from realjax.data.datasets import PromptAnswerDataset
from realjax.data.loader import Loader, Rows, make_shapes, plan_shapes


def make_dataset(num_examples: int, longest: int = 60) -> PromptAnswerDataset:
    """Example i holds the token i+1 only, so a batch tells which examples it has."""
    lengths = np.random.default_rng(num_examples).integers(2, longest + 1, num_examples)
    lengths[0] = longest
    return PromptAnswerDataset(
        ids=tuple(f"row{i}" for i in range(num_examples)),
        tokens=np.repeat(np.arange(1, num_examples + 1, dtype=np.int32), lengths),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        loss_mask=np.concatenate([np.arange(length) > 0 for length in lengths]),
    )


def examples_in(batch) -> Counter:
    """Which ids sit in a batch, by the first token of each sequence."""
    first = (batch["positions"] == 0) & (batch["segment_ids"] > 0)
    return Counter(f"row{token - 1}" for token in batch["tokens"][first])


SIZES = [(40, 10, 1), (45, 10, 3), (77, 10, 8), (10, 10, 4), (11, 10, 5), (19, 10, 2), (1, 1, 3)]


@pytest.mark.parametrize(("num_examples", "batch_size", "num_epochs"), SIZES)
def test_every_example_is_used_once_per_epoch(num_examples, batch_size, num_epochs):
    loader = Loader(make_dataset(num_examples), batch_size=batch_size, num_epochs=num_epochs, seed=3)
    used = []
    for step in range(loader.total_steps):
        ids = loader.ids(step)
        assert examples_in(loader.batch(step)) == Counter(ids)
        assert len(ids) == batch_size or step == loader.total_steps - 1
        used += ids
    epochs = [used[i : i + num_examples] for i in range(0, len(used), num_examples)]
    assert [sorted(epoch) for epoch in epochs] == [sorted(f"row{i}" for i in range(num_examples))] * num_epochs
    assert num_examples < 10 or len({tuple(epoch) for epoch in epochs}) == num_epochs


@pytest.mark.parametrize(("num_examples", "batch_size", "num_epochs"), SIZES)
def test_positions_count_epochs_and_their_steps(num_examples, batch_size, num_epochs):
    loader = Loader(make_dataset(num_examples), batch_size=batch_size, num_epochs=num_epochs, seed=3)
    positions = [loader.position(step) for step in range(loader.total_steps)]
    assert [position.global_step for position in positions] == list(range(1, loader.total_steps + 1))
    assert sum(position.ends_epoch for position in positions) == num_epochs and positions[-1].ends_epoch
    epoch, epoch_step = 1, 0
    for position in positions:
        epoch_step += 1
        assert (position.epoch, position.epoch_step) == (epoch, epoch_step)
        # The sample that ends the epoch is in this batch, and was in none before.
        seen = min(position.global_step * batch_size, num_examples * num_epochs)
        assert position.ends_epoch == (seen >= epoch * num_examples)
        if position.ends_epoch:
            assert epoch_step in (loader.steps_per_epoch, loader.steps_per_epoch - 1)
            epoch, epoch_step = epoch + 1, 0


def test_a_second_loader_gives_the_same_batch_at_any_step():
    def make(seed: int) -> Loader:
        return Loader(make_dataset(45), batch_size=10, num_epochs=4, seed=seed, rows=Rows(num_shards=2))

    first, again = make(seed=5), make(seed=5)
    for step in (17, 3, 0):
        one, other = first.batch(step), again.batch(step)
        assert one.keys() == other.keys() and jax.tree.all(jax.tree.map(np.array_equal, one, other))
    assert make(seed=6).ids(0) != first.ids(0)


def test_a_batch_straddles_two_epochs():
    dataset = make_dataset(15)
    loader = Loader(dataset, batch_size=10, num_epochs=2, seed=0)
    assert loader.total_steps == 3
    assert set(loader.ids(0) + loader.ids(1)[:5]) == set(dataset.ids) == set(loader.ids(1)[5:] + loader.ids(2))
    assert [loader.position(step).epoch for step in range(3)] == [1, 1, 2]
    assert [loader.position(step).ends_epoch for step in range(3)] == [False, True, True]


@pytest.mark.parametrize(("row_multiple", "num_shards"), [(1, 1), (8, 2), (6, 4), (1, 8)])
def test_a_run_of_one_shape(row_multiple, num_shards):
    dataset = make_dataset(101)
    sizes = {"batch_size": 25, "num_epochs": 3, "seed": 1}
    rows = Rows(multiple=row_multiple, num_shards=num_shards, max_shapes=1)
    loader = Loader(dataset, **sizes, rows=rows)
    num_rows, row_len, num_segments = loader.shape
    assert num_rows % row_multiple == 0 and num_rows % num_shards == 0 and row_len % 64 == 0
    batches = [loader.batch(step) for step in range(loader.total_steps)]
    assert {array.shape for batch in batches for array in batch.arrays.values()} == {(num_rows, row_len)}
    assert max(batch["segment_ids"].max() for batch in batches) <= num_segments
    # No larger than needed: with one more multiple of rows taken away, the fullest batch would not fit.
    fewest = max(int((batch["segment_ids"].max(axis=1) > 0).sum()) for batch in batches)
    assert num_rows - fewest < np.lcm(row_multiple, num_shards)
    padding = 1 - sum(batch.num_tokens for batch in batches) / (len(batches) * num_rows * row_len)
    assert loader.padding_share == pytest.approx(padding)
    for batch in batches[:-1]:
        loads = (batch["segment_ids"] > 0).reshape(num_shards, -1).sum(axis=1)
        assert loads.max() - loads.min() <= row_len


def test_longer_rows_on_request():
    dataset = make_dataset(50)
    loader = Loader(dataset, batch_size=25, num_epochs=1, seed=1, rows=Rows(row_len=300))
    assert loader.shape[1] == 300 and loader.batch(1)["tokens"].shape == loader.shape[:2]
    with pytest.raises(ValueError, match="rows of 59 tokens, but the longest example has 60"):
        Loader(dataset, batch_size=25, num_epochs=1, seed=1, rows=Rows(row_len=59))


def test_evaluation_keeps_the_order_and_takes_a_partial_batch():
    dataset = make_dataset(7)
    loader = Loader(dataset, batch_size=100, seed=0, in_order=True)
    assert loader.total_steps == 1 and loader.ids(0) == list(dataset.ids)
    assert examples_in(loader.batch(0)) == Counter(dataset.ids)


def test_sizes_that_make_no_run_are_refused():
    dataset = make_dataset(7)
    good = {"batch_size": 2, "num_epochs": 1, "seed": 0}
    for change, message in [
        ({"batch_size": 8}, "train_bs_n_seqs: a batch of 8 is more than the dataset's 7 examples; set it to 7 or less"),
        ({"batch_size": 0, "name": "dataset.valid_bs_n_seqs"}, "dataset.valid_bs_n_seqs: found 0"),
        ({"num_epochs": 0}, "epochs: found 0"),
        ({"seed": -1}, "seed: found -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            Loader(dataset, **good | change)
    for change, message in [
        ({"multiple": 0}, "row_multiple: found 0"),
        ({"num_shards": -1}, "num_shards: found -1"),
        ({"max_shapes": 0}, "max_shapes: found 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            Rows(**change)
    loader = Loader(dataset, **good)
    for step in (-1, loader.total_steps):
        with pytest.raises(ValueError, match="outside this run's 4 steps"):
            loader.batch(step)


@pytest.mark.parametrize("max_shapes", [1, 2, 3])
def test_the_chosen_rows_pad_least(max_shapes):
    dataset = make_dataset(101)
    lengths = [dataset.lengths[start : start + 25] for start in range(0, 101, 25)]
    chosen = plan_shapes(lengths, 4, max_shapes)
    assert chosen.num_slots == min(make_shapes(lengths, 64 * times, 4, max_shapes).num_slots for times in range(1, 9))


@pytest.mark.parametrize(("batch_size", "row_multiple"), [(2, 1), (5, 1), (9, 2), (40, 4), (101, 1)])
def test_more_shapes_hold_the_same_batches_in_fewer_slots(batch_size, row_multiple):
    dataset = make_dataset(101)
    sizes = {"batch_size": batch_size, "num_epochs": 2, "seed": 1}
    rows = [Rows(multiple=row_multiple, row_len=64, max_shapes=n) for n in (1, 2, 3, 50)]
    loaders = [Loader(dataset, **sizes, rows=one) for one in rows]
    for loader, max_shapes in zip(loaders, (1, 2, 3, 50), strict=True):
        batches = [loader.batch(step) for step in range(loader.total_steps)]
        found = {batch.num_rows for batch in batches}
        assert str(loader.shapes) == f"{' or '.join(map(str, sorted(found)))} x 64"
        assert found == set(loader.shapes.row_counts) and len(found) <= max_shapes and max(found) == loader.shape[0]
        assert all(num_rows % row_multiple == 0 for num_rows in found)
        for step, batch in enumerate(batches):
            assert examples_in(batch) == Counter(loader.ids(step))
            # The smallest that the run has and the batch fits in.
            least = int((batch["segment_ids"].max(axis=1) > 0).sum())
            assert batch.num_rows == min(n for n in found if n >= least)
        padding = 1 - sum(batch.num_tokens for batch in batches) / sum(batch["tokens"].size for batch in batches)
        assert loader.padding_share == pytest.approx(padding)
    slots = [loader.shapes.num_slots for loader in loaders]
    # Each further shape saves a tenth, or it is not there.
    for fewer, more, one, other in zip(slots, slots[1:], loaders, loaders[1:]):
        assert more <= 0.9 * fewer if len(other.shapes.row_counts) > len(one.shapes.row_counts) else more == fewer


def test_the_fingerprint_tells_other_data_or_batches_apart():
    sizes = {"batch_size": 10, "num_epochs": 2, "seed": 0}
    fingerprint = Loader(make_dataset(30), **sizes).fingerprint
    assert Loader(make_dataset(30), **{**sizes, "num_epochs": 3}).fingerprint == fingerprint
    for other in (Loader(make_dataset(29), **sizes), Loader(make_dataset(30), **{**sizes, "batch_size": 9})):
        assert other.fingerprint != fingerprint


def test_the_fingerprint_tells_other_content_of_equal_lengths_apart():
    """Ids, lengths and order the same: every array that an example has counts."""
    dataset, sizes = make_dataset(30), {"batch_size": 10, "num_epochs": 2, "seed": 0}
    tokens = dataset.tokens.copy()
    tokens[-1] += 1
    loss_mask = dataset.loss_mask.copy()
    loss_mask[-1] = False
    changed = [dataset, replace(dataset, tokens=tokens), replace(dataset, loss_mask=loss_mask)]
    assert len({Loader(one, **sizes).fingerprint for one in changed}) == 3


def test_the_first_steps_are_those_of_the_whole_run():
    dataset = make_dataset(45)
    whole = Loader(dataset, batch_size=10, seed=1, num_epochs=3)
    cut = whole.first_steps(6)
    assert (cut.total_steps, whole.total_steps, whole.first_steps(None)) == (6, 14, whole)
    assert whole.first_steps(100).total_steps == 14 and cut.fingerprint == whole.fingerprint
    for step in range(6):
        assert cut.ids(step) == whole.ids(step) and cut.position(step) == whole.position(step)
        assert examples_in(cut.batch(step)) == examples_in(whole.batch(step))


def test_of_many_samples_some_choose_the_length_of_rows(monkeypatch):
    batches = [np.random.default_rng(step).integers(1, 60, 16) for step in range(64)]
    exact = plan_shapes(batches, 2, 3)
    monkeypatch.setattr("realjax.data.loader._MOST_TRIED", 128)
    sampled = plan_shapes(batches, 2, 3)
    assert len(sampled.num_rows) == 64
    np.testing.assert_array_equal(sampled.num_rows, make_shapes(batches, sampled.row_len, 2, 3).num_rows)
    assert sampled.num_slots < 1.1 * exact.num_slots


def test_targets_are_bounded_by_those_of_the_fullest_row_of_the_run():
    """The same number in every batch, at most a sixteenth of the row above what one of them needs; all learned tokens
    are among them, each once.
    """
    dataset = make_dataset(80)
    starts = np.random.default_rng(1).integers(dataset.lengths // 3, dataset.lengths)
    mask = np.concatenate([np.arange(n) >= max(1, start) for n, start in zip(dataset.lengths, starts, strict=True)])
    loader = Loader(replace(dataset, loss_mask=mask), batch_size=12, seed=3, num_epochs=2).split(Rows(multiple=2))
    fullest = 0
    for step in range(loader.total_steps):
        batch = loader.batch(step)
        num_learned = batch["loss_mask"].sum(axis=1)
        fullest = max(fullest, num_learned.max())
        assert batch["targets"].shape == (batch.num_rows, loader.num_targets)
        for row, targets, learned in zip(batch["loss_mask"], batch["targets"], num_learned, strict=True):
            assert targets[:learned].tolist() == np.flatnonzero(row).tolist()
            assert (targets[learned:] == batch.row_len).all()
    assert fullest <= loader.num_targets < fullest + batch.row_len / 16 + 1
    assert "targets" not in Loader(dataset, batch_size=12, seed=3).batch(0), "of nearly all tokens there is none"
