import logging

import numpy as np
import pytest

from realjax.data.datasets import join_answer, load_prompt_answer
from realjax.data.files import Source
from realjax.data.sequences import SequenceForm, make_sequences
from tests.given.texts import make_tokenizer, write_jsonl


class WithoutOffsets:
    """The same tokenizer as one written in Python would look."""

    is_fast = False

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id

    def __call__(self, texts, **kwargs):
        return self._tokenizer(texts, **kwargs)


def write(folder, rows):
    return str(write_jsonl(folder / "data.jsonl", [{"prompt": prompt, "answer": answer} for prompt, answer in rows]))


def load(path, tokenizer, name="dataset.train_path", **form):
    return load_prompt_answer(Source(path=path, name=name), tokenizer, SequenceForm(**form))


def parts(dataset, tokenizer, index):
    """Text that is not learned, text that is."""
    example = dataset.example(index)
    tokens, mask = example["tokens"], example["loss_mask"]
    return tokenizer.decode(tokens[~mask]), tokenizer.decode(tokens[mask])


ROWS = [
    ("the film was", " good and long"),
    ("", "the film"),
    ("a film", ""),
    ("naïve 😀", "😀 été"),
    ("so long\n\n", "\n  so"),
]


def test_only_the_answer_and_one_eos_are_learned(tmp_path):
    tokenizer = make_tokenizer()
    dataset = load(write(tmp_path, ROWS), tokenizer, max_seqlen=1024)
    assert list(dataset.ids) == list(range(len(ROWS))) and len(dataset) == len(ROWS)
    for index, (prompt, answer) in enumerate(ROWS):
        example = dataset.example(index)
        assert (example["tokens"].dtype, example["loss_mask"].dtype) == (np.int32, np.bool_)
        assert len(example["tokens"]) == len(example["loss_mask"]) == dataset.lengths[index]
        assert example["tokens"].tolist() == [*tokenizer(prompt + answer)["input_ids"], tokenizer.eos_token_id]
        if prompt:
            assert parts(dataset, tokenizer, index) == (prompt, answer + "</s>")
    # The first token of a sequence is predicted from nothing.
    assert not dataset.example(1)["loss_mask"][0] and dataset.example(1)["loss_mask"][1:].all()


@pytest.mark.parametrize("special", ["bos", "eos", "bos eos"])
def test_special_tokens_of_the_tokenizer_are_kept_once(tmp_path, special):
    tokenizer = make_tokenizer(special)
    dataset = load(write(tmp_path, ROWS), tokenizer, max_seqlen=1024)
    for index, (prompt, answer) in enumerate(ROWS):
        tokens = dataset.example(index)["tokens"].tolist()
        assert tokens.count(tokenizer.eos_token_id) == 1 and tokens[-1] == tokenizer.eos_token_id
        assert (tokens[0] == tokenizer.bos_token_id) == ("bos" in special)
        if prompt or "bos" in special:
            bos = "<s>" * ("bos" in special)
            assert parts(dataset, tokenizer, index) == (bos + prompt, answer + "</s>")


def test_a_token_across_the_boundary_belongs_to_the_answer(tmp_path):
    tokenizer = make_tokenizer()
    prompt, answer = "the fi", "lm was good"
    prompt_ids = tokenizer(prompt)["input_ids"]
    assert tokenizer(prompt + answer)["input_ids"][: len(prompt_ids)] != prompt_ids, "the case needs a merged token"
    dataset = load(write(tmp_path, [(prompt, answer)]), tokenizer, max_seqlen=1024)
    assert parts(dataset, tokenizer, 0) == ("the", " film was good</s>")


@pytest.mark.parametrize("special", ["", "bos", "bos eos"])
def test_a_tokenizer_without_offsets_finds_the_same_boundary(special):
    tokenizer = make_tokenizer(special)
    prompts, answers = zip(*ROWS, ("the fi", "lm was good"), strict=True)
    passages = [join_answer(*row, is_rendered=False) for row in zip(prompts, answers, strict=True)]
    fast, slow = (
        [(one.tokens.tolist(), one.answer_start) for one in make_sequences(passages, tool, max_seqlen=12)]
        for tool in (tokenizer, WithoutOffsets(tokenizer))
    )
    assert fast == slow


def test_truncation_cuts_the_right_end_and_counts_rows_without_a_target(tmp_path, caplog):
    tokenizer = make_tokenizer()
    rows = [("the film was", " good and long"), ("the film was good and long and good", " so")]
    whole = load(write(tmp_path, rows), tokenizer, max_seqlen=1024)
    prompt_len = int(np.argmax(whole.example(0)["loss_mask"]))
    with caplog.at_level(logging.WARNING):
        cut = load(write(tmp_path, rows), tokenizer, max_seqlen=prompt_len + 1)
    assert cut.lengths.tolist() == [prompt_len + 1] * 2
    for index in range(2):
        tokens, mask = (whole.example(index)[key][: prompt_len + 1] for key in ("tokens", "loss_mask"))
        np.testing.assert_array_equal(cut.example(index)["tokens"], tokens)
        np.testing.assert_array_equal(cut.example(index)["loss_mask"], mask)
    assert not cut.example(1)["loss_mask"].any()
    told = [record.message.split(": ", 1)[1] for record in caplog.records]
    assert told == [
        f"1 of 2 rows have no token to learn: their prompts fill max_seqlen={prompt_len + 1}",
        f"2 of 2 rows have more tokens than max_seqlen={prompt_len + 1} and lose their end",
    ]
    with pytest.raises(ValueError, match="no row of 2 has an answer token within dataset.max_seqlen=1"):
        load(write(tmp_path, rows), tokenizer, max_seqlen=1)


def test_padding_to_the_longest_adds_no_target(tmp_path):
    tokenizer = make_tokenizer()
    plain = load(write(tmp_path, ROWS), tokenizer, max_seqlen=30)
    padded = load(write(tmp_path, ROWS), tokenizer, max_seqlen=30, pad_to_max_length=True)
    assert padded.lengths.tolist() == [30] * len(ROWS)
    for index, length in enumerate(plain.lengths):
        example = padded.example(index)
        np.testing.assert_array_equal(example["tokens"][:length], plain.example(index)["tokens"])
        np.testing.assert_array_equal(example["loss_mask"][:length], plain.example(index)["loss_mask"])
        assert (example["tokens"][length:] == tokenizer.eos_token_id).all() and not example["loss_mask"][length:].any()


def test_what_cannot_be_learned_from_is_refused(tmp_path):
    path = write(tmp_path, ROWS)
    with pytest.raises(ValueError, match="has no EOS token"):
        load(path, make_tokenizer(eos_token=None), max_seqlen=8)
    with pytest.raises(ValueError, match="max_seqlen: found 0"):
        load(path, make_tokenizer(), max_seqlen=0)
    with pytest.raises(ValueError, match="dataset.valid_path: .*nowhere.jsonl' does not exist"):
        load(str(tmp_path / "nowhere.jsonl"), make_tokenizer(), max_seqlen=8, name="dataset.valid_path")
