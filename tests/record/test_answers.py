"""Texts of answers where tokens and texts do not match piece by piece, and what an unfinished file is good for."""

from functools import partial
from typing import Any

import numpy as np
import pytest

from realjax.core.texts import decode_answers
from realjax.data.packing import pack, pack_rows
from realjax.dataflow.run import AnswerFile
from realjax.record.answers import AnswerWriter, Line, make_lines
from realjax.record.rollouts import describe_answers
from realjax.record.samples import Sample, sample_sections
from realjax.runtime.evaluation import read_samples
from tests.given.texts import make_tokenizer, make_words_tokenizer

LINES: list[Line] = [{"id": row_id, "prompt": f"of {row_id}", "sample": i} for row_id in "abc" for i in (0, 1)]


def answer(tokenizer: Any, prompt: str, tokens: list[int], cut: int | None = None, **changes: Any) -> Line:
    """Returns the line of one answer, the fourth, to the prompt's first `cut` tokens."""
    start = tokenizer.encode(prompt)[:cut]
    whole = np.array([*start, *tokens], np.int32)
    sequence = {
        "tokens": whole,
        "loss_mask": np.arange(len(whole)) >= len(start),
        "prompt_id": np.array(0),
        "sample_id": np.array(3),
    }
    rows = ({"id": "p0", "prompt": prompt},)
    file = AnswerFile(**{"name": "out.jsonl", "rows": rows, "num_samples": 1, "stop": (), **changes})
    rollout = pack([sequence], pack_rows([len(whole)], 32))
    (line,) = make_lines(rollout, file, partial(decode_answers, tokenizer))
    return line


def test_an_answer_keeps_the_space_before_it():
    line = answer(make_words_tokenizer(), "the film", [2, 3, 4])
    assert line == {"prompt": "the film", "answer": " was good", "seq": "the film was good", "id": "p0"}
    stopped = answer(make_words_tokenizer(), "the film", [2, 3, 4], stop=("good", " was good"))
    assert stopped["seq"] == "the film"


def conversation(tokenizer: Any, *texts: str, prompt_id: int = 0, **extra: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the row of a prompt's text, and then, in turn, of an answer and what was said to it."""
    parts = [tokenizer.encode(text) for text in texts]
    return {
        "tokens": np.concatenate(parts).astype(np.int32),
        "loss_mask": np.concatenate([np.full(len(part), i % 2 == 1) for i, part in enumerate(parts)]),
        "prompt_id": np.array(prompt_id),
        "sample_id": np.array(0),
        "rewards": np.float32(2.5),
        **extra,
    }


def test_sides_of_a_conversation_are_told_apart():
    tokenizer = make_tokenizer()
    whole = conversation(tokenizer, "the film", "was", "how long", "so so", "is it", "never")
    rollout = pack([whole], pack_rows([len(whole["tokens"])], 64))
    decode_fn = partial(decode_answers, tokenizer)
    (sample,) = read_samples(rollout, decode_fn, "greedy")
    assert sample.prompt == "the film" and sample.reward == 2.5
    assert sample.answer == "[model] was\n[environment] how long\n[model] so so\n[environment] is it\n[model] never"
    (shown,) = describe_answers(rollout, decode_fn, ())
    assert (shown["prompt"], shown["answer"]) == (sample.prompt, sample.answer)


def test_a_conversation_of_one_answer_is_marked_as_the_others_are():
    tokenizer = make_tokenizer()
    short = conversation(tokenizer, "the film", "was", num_turns=np.array(1))
    rollout = pack([short], pack_rows([len(short["tokens"])], 64))
    (sample,) = read_samples(rollout, partial(decode_answers, tokenizer), "greedy")
    assert sample.answer == "[model] was"


def test_answers_to_prompts_that_are_alike_all_stand_in_the_report():
    draw = lambda answer, prompt="guess": Sample(variant="sampled", prompt=prompt, answer=answer, reward=1.0)
    before, after = [draw("3"), draw("5"), draw("7", "other")], [draw("4"), draw("6"), draw("8", "other")]
    (section,) = sample_sections({0: before, 9: after})
    assert section.rows == (
        ("sampled", "guess", "3 (reward 1)", "4 (reward 1)"),
        ("sampled", "guess", "5 (reward 1)", "6 (reward 1)"),
        ("sampled", "other", "7 (reward 1)", "8 (reward 1)"),
    )


def test_a_prompt_that_was_cut_inside_a_character_is_given_whole():
    tokenizer = make_tokenizer()
    cut = len(tokenizer.encode("so é")) - 1
    rest = tokenizer.encode("é")[-1:] + tokenizer.encode(" long")
    whole = answer(tokenizer, "so é", rest, cut)
    assert whole["prompt"] == "so é"
    # The answer's first byte completed the prompt's last character: no text of its own.
    assert whole["seq"] == "so é long" and str(whole["answer"]).endswith(" long")
    stopped = answer(tokenizer, "so é", rest, cut, stop=("lo",))
    assert stopped["seq"] == "so é " and stopped["answer"] == str(whole["answer"]).removesuffix("long")


def test_the_number_of_the_sample_is_told_where_there_are_several():
    assert answer(make_words_tokenizer(), "the film", [2], num_samples=2)["sample"] == 3


def test_lines_stand_in_the_order_of_the_prompts_however_they_are_packed():
    rng = np.random.default_rng(0)
    places = [(prompt, sample) for prompt in range(5) for sample in range(2)]
    sequences = [
        {
            "tokens": np.full(n, 2, np.int32),
            "loss_mask": np.arange(n) >= 1,
            "prompt_id": np.array(prompt),
            "sample_id": np.array(sample),
        }
        for (prompt, sample), n in zip(places, rng.integers(2, 14, len(places)), strict=True)
    ]
    rollout = pack(sequences, pack_rows([len(one["tokens"]) for one in sequences], 16))
    rows = tuple({"id": i, "prompt": f"p{i}"} for i in range(5))
    file = AnswerFile(name="out.jsonl", rows=rows, num_samples=2, stop=())
    lines = make_lines(rollout, file, partial(decode_answers, make_words_tokenizer()))
    assert [(line["id"], line["sample"]) for line in lines] == places


@pytest.mark.parametrize("num_kept", [0, 2, 4])
@pytest.mark.parametrize("torn", ["", '{"id": "b", "sa'])
def test_the_answers_of_saved_steps_are_kept_and_what_follows_comes_again(tmp_path, num_kept, torn):
    path = tmp_path / "out.jsonl"
    first = AnswerWriter(path, 0)
    first.append(LINES[:4])
    with first.part.open("a") as part:
        part.write(torn)
    again = AnswerWriter(path, num_kept)
    again.append(LINES[num_kept:])
    again.finish()
    expected = AnswerWriter(tmp_path / "expected.jsonl", 0)
    expected.append(LINES)
    assert path.read_bytes() == expected.part.read_bytes()
    assert not again.part.exists()
    # A whole file that goes on is a part again.
    AnswerWriter(path, len(LINES))
    assert not path.exists() and again.part.read_bytes() == expected.part.read_bytes()


def test_answers_that_are_gone_are_missed(tmp_path):
    AnswerWriter(tmp_path / "out.jsonl", 0).append(LINES[:3])
    with pytest.raises(ValueError, match="holds 3 answers, but 4 were written before; restore the file, or set"):
        AnswerWriter(tmp_path / "out.jsonl", 4)
    assert (tmp_path / "out.jsonl.part").read_text().count("\n") == 3
