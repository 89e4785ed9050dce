"""Labelled answers: what an example holds, whose answer is beside it, and what is refused."""

import numpy as np
import pytest

from realjax.data.files import Source
from realjax.data.labelled import find_others, load_labelled
from realjax.data.loader import Loader
from realjax.data.packing import PART_LENS
from realjax.data.sequences import SequenceForm
from tests.given.texts import make_tokenizer, write_jsonl

ROWS = [
    {"id": f"r{i}", "prompt": f"the film {prompt} was", "answer": f" good, {i}", "label": i % 2 == 0}
    for i, prompt in enumerate("aabca")
]


def load(folder, rows=ROWS, max_seqlen=1024):
    source = Source(path=str(write_jsonl(folder / "rows.jsonl", rows)))
    return load_labelled(source, make_tokenizer(), SequenceForm(max_seqlen=max_seqlen))


def test_an_example_is_an_answer_and_another_prompts_answer(tmp_path):
    tokenizer, dataset = make_tokenizer(), load(tmp_path)
    others = [2, 2, 3, 4, 2]  # the next row with another prompt, round the end
    assert len(dataset) == len(ROWS) and list(dataset.ids) == [row["id"] for row in ROWS]
    for i, row in enumerate(ROWS):
        example = dataset.example(i)
        assert sum(example[PART_LENS]) == len(example["tokens"]) == dataset.lengths[i]
        assert max(example[PART_LENS]) <= dataset.longest
        assert example["desirable"].tolist() == [row["label"], 0] and example["is_other"].tolist() == [False, True]
        cut = example[PART_LENS][:1]
        parts = zip(np.split(example["tokens"], cut), np.split(example["loss_mask"], cut), (i, others[i]), strict=True)
        for tokens, mask, other in parts:
            text = tokenizer.decode(tokens[~mask]), tokenizer.decode(tokens[mask])
            assert text == (row["prompt"], ROWS[other]["answer"] + "</s>")


def test_rows_of_one_prompt_are_beside_each_other_and_this_is_said(tmp_path, caplog):
    np.testing.assert_array_equal(find_others(["a"] * 3), [1, 2, 0])
    np.testing.assert_array_equal(find_others(["a"]), [0])
    load(tmp_path, [{**row, "prompt": "the film was"} for row in ROWS])
    assert "all 5 rows have one prompt" in caplog.text


def test_epochs_hold_every_answer_once_and_follow_from_the_seed(tmp_path):
    dataset = load(tmp_path)
    for epoch in range(3):
        assert sorted(dataset.order(7, epoch, True)) == list(range(5))
        np.testing.assert_array_equal(dataset.order(7, epoch, True), load(tmp_path).order(7, epoch, True))
    batch = Loader(dataset, batch_size=5, num_epochs=1, seed=1).batch(0)
    assert batch["is_other"].sum() == 5 and batch["desirable"].sum() == 3


def test_what_cannot_serve_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"line 1: 'label' has type string; every row needs .*'label' \(boolean\)"):
        load(tmp_path, [{**row, "label": "yes"} for row in ROWS])
    with pytest.raises(ValueError, match="no row of 5 has an answer token within dataset.max_seqlen=2"):
        load(tmp_path, max_seqlen=2)
    assert load(tmp_path).fingerprint != load(tmp_path, [{**row, "label": True} for row in ROWS]).fingerprint
