"""Texts of answers where tokens and texts do not match piece by piece, and what an unfinished file is good for."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from realjax.data.prompts import PromptDataset
from realjax.dataflow.generation_run import GenerationSpec
from realjax.engine.batching import Generation, Request
from realjax.runtime.answers import PART, AnswerFile, make_answers
from tests.data.test_datasets import make_tokenizer, words_tokenizer

IDS = ("a", "b", "c")
ROWS = [{"id": row_id, "prompt": f"of {row_id}"} for row_id in IDS]
LINES = [{"id": row_id, "prompt": f"of {row_id}", "sample": sample} for row_id in IDS for sample in (0, 1)]


def make_spec(tokenizer: Any, prompt: str, **changes: Any) -> GenerationSpec:
    tokens = np.array(tokenizer.encode(prompt), np.int32)
    prompts = PromptDataset(
        ids=("p0",),
        rows=({"id": "p0", "prompt": prompt},),
        texts=(prompt,),
        tokens=tokens,
        offsets=np.array([0, len(tokens)]),
    )
    rest: Any = dict.fromkeys(
        ("title", "config_json", "identity", "paths", "role", "layout", "config", "eos_ids", "num_slots")
    )
    spec = GenerationSpec(
        **{**rest, "prompts": prompts, "tokenizer": tokenizer, "prompts_per_call": 1, "output_file": None, "seed": 0},
        num_samples=1,
        stop=(),
    )
    return replace(spec, **changes)


def answer(spec: GenerationSpec, tokens: list[int], num_prompt_tokens: int | None = None) -> dict[str, Any]:
    request = Request(tokens=spec.prompts.example(0)["tokens"][:num_prompt_tokens], row_id=0, sample_id=3)
    ids = np.array(tokens, np.int32)
    generation = Generation(tokens=ids, logprobs=np.zeros(len(ids), np.float32), ended=True, kept=None)
    (line,) = make_answers(spec, [request], [generation])
    return line


def test_an_answer_keeps_the_space_before_it():
    spec = make_spec(words_tokenizer(), "the film")
    line = answer(spec, [2, 3, 4])
    assert line == {"prompt": "the film", "answer": " was good", "seq": "the film was good", "id": "p0"}
    assert answer(replace(spec, stop=("good", " was good")), [2, 3, 4])["seq"] == "the film"


def test_a_prompt_that_was_cut_inside_a_character_is_given_whole():
    tokenizer = make_tokenizer()
    spec = make_spec(tokenizer, "so é")
    cut = len(tokenizer.encode("so é")) - 1
    whole = answer(spec, tokenizer.encode("é")[-1:] + tokenizer.encode(" long"), cut)
    assert whole["prompt"] == "so é"
    # The answer's first byte completed the prompt's last character: no text of its own.
    assert whole["seq"] == "so é long" and whole["answer"].endswith(" long")
    stopped = answer(replace(spec, stop=("lo",)), tokenizer.encode("é")[-1:] + tokenizer.encode(" long"), cut)
    assert stopped["seq"] == "so é " and stopped["answer"] == whole["answer"].removesuffix("long")


def test_the_number_of_the_sample_is_told_where_there_are_several():
    spec = make_spec(words_tokenizer(), "the film", num_samples=2)
    assert answer(spec, [2])["sample"] == 3


@pytest.mark.parametrize("num_lines", range(len(LINES) + 1))
@pytest.mark.parametrize("torn", ["", '{"id": "b", "sa'])
def test_whole_prompts_are_kept(tmp_path, num_lines, torn):
    file = AnswerFile(tmp_path / "out.jsonl")
    file.append(LINES[:num_lines])
    with file.part.open("a") as part:
        part.write(torn)
    num_done = file.count_answered(ROWS, num_samples=2)
    assert num_done == num_lines // 2
    file.keep_answered(2 * num_done)
    file.append(LINES[2 * num_done :])
    file.finish()
    expected = AnswerFile(tmp_path / "expected.jsonl")
    expected.append(LINES)
    assert file.path.read_bytes() == expected.part.read_bytes()
    assert not Path(f"{file.path}{PART}").exists()


@pytest.mark.parametrize("change", [{"id": "x"}, {"prompt": "another text"}])
def test_answers_to_other_prompts_are_refused(tmp_path, change):
    file = AnswerFile(tmp_path / "out.jsonl")
    file.append(LINES)
    with pytest.raises(ValueError, match="are not those to the first prompts of dataset.path; continue with"):
        file.count_answered([ROWS[0], ROWS[1] | change, ROWS[2]], num_samples=2)
    assert file.part.read_text().count("\n") == len(LINES)


def test_a_whole_file_goes_on_where_the_data_have_grown(tmp_path):
    file = AnswerFile(tmp_path / "out.jsonl")
    file.append(LINES[:4])
    file.finish()
    assert file.count_answered(ROWS, num_samples=2) == 2
    file.keep_answered(4)
    assert not file.path.exists() and file.part.read_text().count("\n") == 4
