"""Pairs of answers: what an example holds, which pairs an epoch draws, and what is refused."""

import json
import logging
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from realjax.data.files import Source
from realjax.data.loader import Loader, Rows
from realjax.data.packing import PART_LENS
from realjax.data.paired import PairedDataset, load_paired
from realjax.data.sequences import SequenceForm
from tests.given.texts import make_tokenizer, write_jsonl

GROUPS = (1, 4, 2, 7, 3)  # pairs of each prompt


def make_rows(groups=GROUPS):
    """Rows whose answers tell their prompt and their number."""
    return [
        {
            "id": f"p{i}",
            "prompt": f"the film {i} was",
            "pos_answers": [f" good, {i} {j}" for j in range(size)],
            "neg_answers": [f" so so so long, {i} {j}" for j in range(size)],
        }
        for i, size in enumerate(groups)
    ]


def write(folder, rows, name="pairs.jsonl"):
    return str(write_jsonl(folder / name, rows))


def load(folder, rows=None, max_seqlen=1024, max_pairs=2, **options) -> PairedDataset:
    path = write(folder, make_rows() if rows is None else rows)
    form = SequenceForm(max_seqlen=max_seqlen, **options)
    return load_paired(Source(path=path), make_tokenizer(), form, max_pairs_per_prompt=max_pairs)


def test_an_example_is_a_better_and_a_worse_answer_to_one_prompt(tmp_path):
    tokenizer, rows = make_tokenizer(), make_rows()
    dataset = load(tmp_path, rows)
    expected = [
        (row["prompt"], better, worse)
        for row in rows
        for better, worse in zip(row["pos_answers"], row["neg_answers"], strict=True)
    ]
    assert len(dataset) == len(expected) == sum(GROUPS) == len(set(dataset.ids))
    for i, (prompt, *answers) in enumerate(expected):
        example = dataset.example(i)
        assert sum(example[PART_LENS]) == len(example["tokens"]) == dataset.lengths[i]
        assert max(example[PART_LENS]) <= dataset.longest
        cut = example[PART_LENS][:1]
        parts = zip(np.split(example["tokens"], cut), np.split(example["loss_mask"], cut), answers, strict=True)
        for tokens, mask, answer in parts:
            assert (tokenizer.decode(tokens[~mask]), tokenizer.decode(tokens[mask])) == (prompt, answer + "</s>")


@pytest.mark.parametrize("max_pairs", [1, 2, 3, 10])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_draws_at_most_so_many_pairs_of_a_prompt_and_keeps_them_together(tmp_path, max_pairs, shuffle):
    dataset = load(tmp_path, max_pairs=max_pairs)
    for epoch in range(3):
        order = dataset.order(7, epoch, shuffle)
        assert len(set(order)) == len(order)
        prompts = dataset.prompts[order].tolist()
        assert Counter(prompts) == {i: min(size, max_pairs) for i, size in enumerate(GROUPS)}
        changes = 1 + sum(a != b for a, b in zip(prompts, prompts[1:], strict=False))
        assert changes == len(GROUPS)
        weights = [float(dataset.example(i)["pair_weight"]) for i in order]
        np.testing.assert_allclose(np.bincount(prompts, weights), 1, rtol=1e-6)


def test_the_draw_follows_from_seed_and_epoch(tmp_path):
    dataset, again = load(tmp_path), load(tmp_path)
    orders = [tuple(dataset.order(3, epoch, True)) for epoch in range(40)]
    assert orders == [tuple(again.order(3, epoch, True)) for epoch in range(40)]
    assert len(set(orders)) > 30 and orders[0] != tuple(dataset.order(4, 0, True))
    # Every pair has its turn, those of the prompt with seven too.
    assert set(np.concatenate(orders)) == set(range(len(dataset)))


def test_without_shuffling_epochs_are_alike_and_prompts_in_order(tmp_path):
    dataset = load(tmp_path)
    first = dataset.order(3, 0, False)
    assert dataset.prompts[first].tolist() == sorted(dataset.prompts[first].tolist())
    np.testing.assert_array_equal(first, dataset.order(3, 5, False))


def test_both_answers_are_neighbours_in_one_row(tmp_path):
    dataset = load(tmp_path)
    loader = Loader(dataset, batch_size=4, num_epochs=3, seed=1, rows=Rows(multiple=2, num_shards=2))
    by_tokens = {
        tuple(dataset.example(i)["tokens"].tolist()): dataset.example(i)["pair_weight"] for i in range(len(dataset))
    }
    num_pairs = 0
    for step in range(loader.total_steps):
        batch = loader.batch(step)
        for row in range(batch.num_rows):
            tokens, segments, weights = (batch[key][row] for key in ("tokens", "segment_ids", "pair_weight"))
            ended = False
            for slot, weight in enumerate(weights):
                pair = tuple(tokens[(segments == 2 * slot + 1) | (segments == 2 * slot + 2)].tolist())
                ended |= not pair
                assert weight == (0 if ended else by_tokens[pair])
                num_pairs += not ended
    assert num_pairs == 3 * sum(min(size, 2) for size in GROUPS)


def test_a_resumed_loader_goes_on_with_the_same_pairs(tmp_path):
    first, again = (Loader(load(tmp_path), batch_size=4, num_epochs=3, seed=5) for _ in range(2))
    for step in (4, 2):
        assert first.ids(step) == again.ids(step)
        one, other = first.batch(step), again.batch(step)
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[key], other[key]) for key in one)


def test_long_answers_are_cut_and_pairs_that_become_equal_are_counted(tmp_path, caplog):
    rows = make_rows((1, 1))
    rows[1]["neg_answers"] = rows[1]["pos_answers"]
    whole = load(tmp_path, rows[:1])
    prompt_len = int(np.argmax(whole.example(0)["loss_mask"]))
    cut = load(tmp_path, rows[:1], max_seqlen=prompt_len + 2)
    assert cut.example(0)[PART_LENS].tolist() == [prompt_len + 2] * 2
    np.testing.assert_array_equal(cut.take_pair(0)[0], whole.take_pair(0)[0][: prompt_len + 2])
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        load(tmp_path, rows)
    assert len(caplog.records) == 1 and "1 of 2 pairs have equal answers" in caplog.text
    with pytest.raises(ValueError, match=r"^dataset.train_path: .*no pair of 1 has answers that differ within"):
        load(tmp_path, rows[:1], max_seqlen=prompt_len)


GOOD = make_rows((1,))[0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**GOOD, "id": 1, "neg_answers": []}, "found 1 pos_answers and 0 neg_answers; it needs as many of each"),
        ({**GOOD, "id": 1, "pos_answers": [], "neg_answers": []}, "found 0 pos_answers and 0 neg_answers"),
        ({**GOOD, "id": 1, "pos_answers": [3]}, "an answer is no string"),
        ({**GOOD, "id": 1, "pos_answers": "good"}, "'pos_answers' has type string"),
        ({"id": 1, "prompt": "a", "pos_answer": ["b"], "neg_answers": ["c"]}, "no key 'pos_answers'"),
        ({**GOOD, "id": 1, "neg_answers": ["\ud800"]}, "'neg_answers' holds half of a surrogate pair"),
    ],
)
def test_a_wrong_row_is_named_by_its_line(tmp_path, row, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=rf"^dataset.valid_path: '.*pairs.jsonl' line 3: .*{message}"):
        source = Source(path=str(path), name="dataset.valid_path")
        load_paired(source, make_tokenizer(), SequenceForm(max_seqlen=64), max_pairs_per_prompt=2)


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    source, form = Source(path=write(tmp_path, make_rows())), SequenceForm(max_seqlen=64)
    with pytest.raises(ValueError, match="has no EOS token"):
        load_paired(source, make_tokenizer(eos_token=None), form, max_pairs_per_prompt=2)


def test_the_fingerprint_tells_better_from_worse(tmp_path):
    """Ids, tokens in all and lengths the same."""
    loaded = load(tmp_path)
    dataset = replace(loaded, known_fingerprint=None)
    tokens = np.concatenate([part for i in range(len(dataset)) for part in reversed(dataset.take_pair(i))])
    starts = np.array(dataset.answer_starts)
    starts[0] += 1
    changed = [
        dataset,
        replace(dataset, tokens=tokens),
        replace(dataset, answer_starts=starts),
        replace(dataset, max_pairs=3),
    ]
    assert len({one.fingerprint for one in changed}) == 4
    assert load(tmp_path).fingerprint == loaded.fingerprint
