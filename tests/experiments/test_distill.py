"""Distillation's data: which answers are the data's, of what rows, and held-out sets by name."""

from pathlib import Path

import pytest

from realjax.dataflow.graph import Generate
from realjax.dataflow.run import RunSpec
from realjax.experiments.common import load_tokenizer
from tests.given.runs import Given, build_spec, make_options
from tests.given.texts import write_jsonl

ROWS = [{"prompt": "the film was", "answer": f" {word} and so on"} for word in ("good", "dull", "long")]


def build(given: Given, root: Path, **changes: object) -> RunSpec:
    options: dict[str, object] = {"dataset__max_prompt_len": 16, "dataset__train_bs_n_seqs": 2}
    options["distill__data_share"] = 1.0
    return build_spec("distill", make_options("distill", given, root, **(options | changes)), is_planned=False)


def list_given(spec: RunSpec, given: Given, num_rows: int) -> list[str]:
    """Returns the texts of the data's answers to the prompts numbered from 0."""
    (call,) = (call for call in spec.graph.calls if isinstance(call, Generate))
    assert call.given_fn is not None
    found = [call.given_fn(row, 0) for row in range(num_rows)]
    return [str(load_tokenizer(given.actor).decode(tokens)) for tokens in found if tokens is not None]


def test_the_datas_answers_are_those_of_the_rows_in_all_sources(given, tmp_path):
    """Questions are joined to their answers in another way than prompts are."""
    questions = [{"question": row["prompt"], "answer": row["answer"].strip()} for row in ROWS]
    paths = [write_jsonl(tmp_path / "a.jsonl", ROWS), write_jsonl(tmp_path / "b.jsonl", questions)]
    spec = build(given, tmp_path, dataset__path=",".join(map(str, paths)), distill__gen__max_new_tokens=64)
    texts = [row["answer"] for row in (*ROWS, *questions)]
    assert list_given(spec, given, 6) == [f"{text}<eos>" for text in texts]
    cut = build(given, tmp_path, dataset__path=paths[0], distill__gen__max_new_tokens=3)
    assert all(text.startswith(shown) and shown for shown, text in zip(list_given(cut, given, 3), texts, strict=False))


def test_held_out_sets_are_read_by_their_names(given, tmp_path):
    for name, rows in (("a", ROWS), ("b", ROWS[:2])):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    sets = f"[{tmp_path}/a.jsonl,few={tmp_path}/b.jsonl]"
    spec = build(given, tmp_path, dataset__path=tmp_path / "a.jsonl", dataset__valid_path=sets, eval_freq_epochs=1)
    assert {name: one.loader.total_steps for name, one in spec.evaluations.items()} == {"a": 2, "few": 1}


def test_a_row_without_an_answer_is_refused_where_answers_are_the_datas(given, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "so"}])
    with pytest.raises(ValueError, match="^dataset.path: .* line 1: found no 'answer'; distill.data_share above 0"):
        build(given, tmp_path, dataset__path=path, dataset__train_bs_n_seqs=1)
