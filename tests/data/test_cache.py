"""Tokens made once: the same with and without, found again, made again where damaged, shared by processes."""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from realjax.data.cache import digest_tokenizer
from realjax.data.datasets import load_prompt_answer
from realjax.data.files import Source
from realjax.data.labelled import load_labelled
from realjax.data.loader import Loader
from realjax.data.mixture import Mixture, share_out
from realjax.data.paired import load_paired
from realjax.data.prompts import PromptForm, load_prompts
from realjax.data.sequences import SequenceForm
from tests.given.templates import QWEN
from tests.given.texts import draw_text, make_tokenizer, write_jsonl

FORM = SequenceForm(max_seqlen=64)
KINDS = {
    "answers": lambda source, tokenizer: load_prompt_answer(source, tokenizer, FORM),
    "pairs": lambda source, tokenizer: load_paired(source, tokenizer, FORM, max_pairs_per_prompt=2),
    "labels": lambda source, tokenizer: load_labelled(source, tokenizer, FORM),
    "prompts": lambda source, tokenizer: load_prompts(source, tokenizer, PromptForm(max_len=8)),
}


def write(folder, num_rows=20, seed=0, **keys):
    rng = np.random.default_rng(seed)
    draw = lambda: " " + draw_text(rng, 1, 6)
    rows = [
        {"prompt": draw(), "answer": draw(), "pos_answers": [draw()], "neg_answers": [draw()], "label": i % 3 == 0}
        for i in range(num_rows)
    ]
    return str(write_jsonl(folder / f"rows{seed}.jsonl", [{**row, **keys} for row in rows]))


def assert_same_batches(one, other):
    loaders = [Loader(dataset, batch_size=4, seed=3, num_epochs=2) for dataset in (one, other)]
    assert loaders[0].fingerprint == loaders[1].fingerprint and loaders[0].total_steps == loaders[1].total_steps
    for step in range(loaders[0].total_steps):
        batches = [loader.batch(step) for loader in loaders]
        assert loaders[0].ids(step) == loaders[1].ids(step) and batches[0].keys() == batches[1].keys()
        for key in batches[0]:
            np.testing.assert_array_equal(batches[0][key], batches[1][key])


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_the_same_with_and_without_a_cache(tmp_path, caplog, kind):
    path, tokenizer, load = write(tmp_path), make_tokenizer(), KINDS[kind]
    caplog.set_level(logging.INFO)
    without = load(Source(path=path), tokenizer)
    first, second = (load(Source(path=path, cache=tmp_path / "cache"), tokenizer) for _ in range(2))
    assert caplog.text.count("tokenised before") == 1
    assert isinstance(second.tokens, np.memmap)
    for cached in (first, second):
        assert_same_batches(without, cached)
    if kind == "prompts":
        assert list(without.rows) == list(second.rows)


def test_what_decides_about_tokens_decides_about_the_cache(tmp_path):
    cache, tokenizer = tmp_path / "cache", make_tokenizer()
    entries = lambda: len([path for path in cache.iterdir() if path.is_dir()])
    path = write(tmp_path)
    load_prompt_answer(Source(path=path, cache=cache), tokenizer, FORM)
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes((tmp_path / "rows0.jsonl").read_bytes())
    load_prompt_answer(Source(path=str(copy), cache=cache, name="dataset.valid_path"), make_tokenizer(), FORM)
    assert entries() == 1, "the same content, wherever it lies"
    load_prompt_answer(Source(path=path, cache=cache), tokenizer, SequenceForm(max_seqlen=63))
    load_prompt_answer(Source(path=path, cache=cache, max_rows=7), tokenizer, FORM)
    load_prompt_answer(Source(path=path, cache=cache), make_tokenizer("bos"), FORM)
    write(tmp_path, answer=" so")
    load_prompt_answer(Source(path=path, cache=cache), tokenizer, FORM)
    assert entries() == 5
    assert len({digest_tokenizer(QWEN.tokenizer(is_marked=marked)) for marked in (False, True)}) == 2


@pytest.mark.parametrize("damage", ["shorter", "other", "gone", "manifest"])
def test_a_damaged_cache_is_made_again(tmp_path, caplog, damage):
    source, tokenizer = Source(path=write(tmp_path), cache=tmp_path / "cache"), make_tokenizer()
    whole = load_prompt_answer(source, tokenizer, FORM)
    (entry,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    content = (entry / "tokens").read_bytes()
    if damage == "gone":
        (entry / "tokens").unlink()
    elif damage == "manifest":
        (entry / "manifest.json").write_text("{")
    else:
        (entry / "tokens").write_bytes(content[:-4] if damage == "shorter" else content[:-4] + b"\1\1\0\0")
    again = load_prompt_answer(source, tokenizer, FORM)
    assert "the cache of its tokens is damaged" in caplog.text
    assert again.fingerprint == whole.fingerprint and (entry / "tokens").read_bytes() == content
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]


def test_a_bad_row_leaves_nothing_behind_and_warnings_are_said_again(tmp_path, caplog):
    source, tokenizer = Source(path=write(tmp_path), cache=tmp_path / "cache"), make_tokenizer()
    for _ in range(2):
        caplog.clear()
        load_prompt_answer(source, tokenizer, SequenceForm(max_seqlen=8))
        assert "rows have more tokens than max_seqlen=8 and lose their end" in caplog.text
    caplog.clear()
    load_prompt_answer(replace(source, name="dataset.valid_path (a)"), tokenizer, SequenceForm(max_seqlen=8))
    assert {record.getMessage().partition(": ")[0] for record in caplog.records} == {"dataset.valid_path (a)"}
    write(tmp_path, answer=3)
    with pytest.raises(ValueError, match="line 1: 'answer' has type integer"):
        load_prompt_answer(source, tokenizer, FORM)
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1


def test_a_reward_checks_rows_that_come_from_the_cache(tmp_path):
    source, seen = Source(path=write(tmp_path), cache=tmp_path / "cache"), []
    for _ in range(2):
        load_prompts(
            source, make_tokenizer(), PromptForm(max_len=8), check_fn=lambda row, place: seen.append(row["id"])
        )
    assert seen == [*range(20), *range(20)]


def test_those_who_start_together_share_one_cache(tmp_path, caplog):
    """Threads here: the kernel's lock is of the open file, so they keep each other out as processes do."""
    caplog.set_level(logging.INFO)
    source, tokenizers = Source(path=write(tmp_path, 200), cache=tmp_path / "cache"), [make_tokenizer() for _ in "abc"]
    with ThreadPoolExecutor(3) as pool:
        sets = list(pool.map(lambda tokenizer: load_prompt_answer(source, tokenizer, FORM), tokenizers))
    assert len({data.fingerprint for data in sets}) == 1
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1
    assert caplog.text.count("tokenised before") == 2


def test_a_mixture_gives_each_source_its_share_of_every_epoch(tmp_path):
    sources = [Source(path=write(tmp_path, num_rows, seed)) for seed, num_rows in ((1, 30), (2, 10))]
    parts = tuple(load_prompt_answer(source, make_tokenizer(), FORM) for source in sources)
    for weights, counts in (((), (30, 10)), ((1, 1), (20, 20)), ((1, 3), (10, 30))):
        mixed = Mixture(parts=parts, weights=weights)
        for epoch in range(3):
            order = mixed.order(5, epoch, True)
            assert (np.sum(order < 30), np.sum(order >= 30)) == counts
            times = np.bincount(order, minlength=40)
            assert np.ptp(times[:30]) <= 1 and np.ptp(times[30:]) <= 1
            np.testing.assert_array_equal(order, mixed.order(5, epoch, True))
        assert not np.array_equal(mixed.order(5, 0, True), mixed.order(5, 1, True))
        np.testing.assert_array_equal(mixed.order(5, 2, False), np.arange(40))
    for index in (0, 29, 30, 39):
        part, place = parts[index >= 30], index % 30
        np.testing.assert_array_equal(mixed.example(index)["tokens"], part.example(place)["tokens"])
        assert mixed.ids[index] == part.ids[place]
    assert share_out(7, (1, 1, 1)) == [2, 3, 2]
    assert Mixture(parts=parts).fingerprint != mixed.fingerprint


def test_prompts_of_a_mixture_know_their_rows(tmp_path):
    sources = [Source(path=write(tmp_path, num_rows, seed)) for seed, num_rows in ((1, 3), (2, 2))]
    parts = tuple(load_prompts(source, make_tokenizer(), PromptForm(max_len=64)) for source in sources)
    mixed = Mixture(parts=parts)
    for i in range(5):
        assert int(mixed.example(i)["prompt_id"]) == i
        assert mixed.rows[i] == parts[i >= 3].rows[i % 3]
