"""What a function is told of a rollout, where its numbers go, and what is said when it goes wrong."""

import re
import sys
from decimal import Decimal

import numpy as np
import pytest

from realjax.rewards.failures import Failures
from realjax.rewards.functions import check_row, checks_rows, load_function
from realjax.rewards.text import make_text_reward
from tests.given.texts import make_words_tokenizer
from tests.rewards.text_rollouts import SAMPLES, TOKENIZER, pack_samples, places

ROWS = [{"id": f"row{i}", "prompt": "p", "grade": 10 * i} for i in range(3)]


def rewards_of(fn, arrays, name="reward.fn: it"):
    return make_text_reward(fn, TOKENIZER, ROWS, name=name)(arrays, {}).arrays["rewards"]


@pytest.mark.parametrize("row_len", [28, 48, 200])
def test_a_function_reads_texts_and_rows_however_they_are_packed(row_len):
    arrays, seen = pack_samples(row_len=row_len), {}

    def score(prompts, answers, rows):
        seen.update(prompts=prompts, answers=answers, grades=[row["grade"] for row in rows])
        return [1 + i for i in range(len(answers))]

    rewards = rewards_of(score, arrays)
    assert seen["prompts"] == [prompt for _, prompt, _, _ in SAMPLES]
    assert seen["answers"] == [answer for _, _, answer, _ in SAMPLES]
    assert seen["grades"] == [10 * prompt_id for prompt_id, *_ in SAMPLES]
    assert rewards.shape == arrays["prompt_id"].shape and rewards.dtype == np.float32
    where = places(arrays["segment_ids"])
    assert [rewards[place] for place in where] == [1, 2, 3, 4]
    assert np.count_nonzero(rewards) == len(where)


def test_a_function_reads_the_answer_where_it_stands():
    """A tokenizer that drops the space a text begins with would give `the filmwas good`."""
    tokens, seen = np.array([[0, 1, 2, 3, 4]]), []
    arrays = {
        "tokens": tokens,
        "segment_ids": np.ones_like(tokens),
        "loss_mask": np.arange(5)[None] >= 2,
        "prompt_id": np.zeros((1, 1), np.int32),
    }
    score = lambda prompts, answers, rows: seen.extend(zip(prompts, answers)) or [0.0]
    make_text_reward(score, make_words_tokenizer(), ROWS, name="reward.fn")(arrays, {})
    assert seen == [("the film", " was good")]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], r"it returned \[1.0\], of shape \[1\]; .* one number for each of 4 answers"),
        ([[1.0]] * 4, r"it returned .*, of shape \[4, 1\]"),
        (None, r"it returned None"),
        (["good"] * 4, r"it returned \['good', 'good', 'good', 'good'\]; "),
        ([10**400] * 4, "it returned .* one number for each of 4 answers"),
        (["1", "2", "3", "4"], "it returned .*'1'.* one number"),
        ({0: 1.0}, "it returned .* one number"),
        ([[1.0], [1.0, 2.0], [], []], "it returned .* one number"),
        ((x for x in range(4)), "it returned <generator"),
    ],
)
def test_a_wrong_return_value_is_told(returned, message):
    failures, arrays = Failures(), pack_samples()
    fn = make_text_reward(lambda *_: returned, TOKENIZER, ROWS, name="reward.fn=mine:score", failures=failures)
    rewards = fn(arrays, {}).arrays["rewards"]
    assert all(np.isnan(rewards[place]) for place in places(arrays["segment_ids"]))
    assert re.match(f"reward.fn=mine:score: {message}", str(failures))


@pytest.mark.parametrize("bad", [float("nan"), None, -float("inf"), 1e300])
def test_an_answer_without_a_number_fails_alone_and_is_told_once(bad, caplog):
    fn = make_text_reward(lambda *_: [1.0, bad, 3.0, bad], TOKENIZER, ROWS, name="mine")
    arrays = pack_samples()
    for _ in range(2):
        rewards = fn(arrays, {}).arrays["rewards"]
        found = [rewards[place] for place in places(arrays["segment_ids"])]
        np.testing.assert_array_equal(found, [1, np.nan, 3, np.nan])
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(
        f"mine: it returned {np.float64(bad)}, for the answer ' that was so long' to row 0 (id row0); "
    )


@pytest.mark.parametrize("returned", [[True] * 4, np.ones(4, np.int8), (Decimal(1),) * 4, [np.float16(1)] * 4])
def test_any_kind_of_number_is_one(returned):
    assert rewards_of(lambda *_: returned, pack_samples()).sum() == 4


def test_what_a_function_does_to_its_arguments_is_undone():
    """Its lists and rows are its own: the data, the next call and the answer that an error shows do not change."""
    rows = [{"id": f"row{i}", "tags": ["kept"]} for i in range(3)]

    def spoil(prompts, answers, given):
        for row in given:
            row["tags"].clear()
        prompts.clear(), answers.clear(), given.clear()
        return [0.0, float("nan"), 0.0, 0.0]

    for _ in range(2):
        failures = Failures()
        make_text_reward(spoil, TOKENIZER, rows, name="mine", failures=failures)(pack_samples(), {})
        assert str(failures) == "mine: it returned nan, for the answer ' that was so long' to row 0 (id row0)"
    assert rows == [{"id": f"row{i}", "tags": ["kept"]} for i in range(3)]


def test_answers_of_an_environment_that_failed_are_not_asked_about():
    arrays, seen = pack_samples(), []
    arrays["env_failed"] = np.zeros(arrays["prompt_id"].shape, bool)
    arrays["env_failed"][places(arrays["segment_ids"])[1]] = True
    rewards_of(lambda prompts, answers, rows: seen.extend(answers) or [1.0] * len(answers), arrays)
    assert seen == [answer for i, (_, _, answer, _) in enumerate(SAMPLES) if i != 1]


def test_load_function_finds_a_module_on_the_path(tmp_path, monkeypatch):
    (tmp_path / "length_of_answers.py").write_text("def score(prompts, answers, rows): return list(map(len, answers))")
    monkeypatch.syspath_prepend(tmp_path)
    fn = load_function("length_of_answers:score")
    assert fn(["p"], ["abc"], [{}]) == [3]
    sys.modules.pop("length_of_answers")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_colon", "reward.fn: found 'no_colon'; it needs <module>:<function>"),
        (":score", "it needs <module>:<function>"),
        ("no_such_module_here:score", "the module of 'no_such_module_here:score' cannot be found; install it"),
        ("json.no_such_part:score", "cannot be found"),
        ("json:no_such_name", "json has no such name; it needs a function"),
        ("sys:path", "sys has it as a list; it needs a function"),
        ("broken_syntax:score", "the module of 'broken_syntax:score' cannot be imported (SyntaxError: "),
        ("fails_early:score", "the module of 'fails_early:score' cannot be imported (ZeroDivisionError: "),
        ("exits_early:score", "the module of 'exits_early:score' cannot be imported (SystemExit: 0)"),
        ("takes_two:score", "'takes_two:score' takes (prompts, answers) (too many positional arguments); it needs a"),
        ("needs_more:score", "the module of 'needs_more:score' needs 'no_such_dependency'; install it"),
    ],
)
def test_load_function_says_what_is_wrong(path, message, tmp_path, monkeypatch):
    sources = {
        "needs_more": "import no_such_dependency",
        "broken_syntax": "def score(:",
        "fails_early": "1 / 0",
        "exits_early": "import sys; sys.exit(0)",
        "takes_two": "def score(prompts, answers): return []",
    }
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError) as caught:
        load_function(path)
    assert message in str(caught.value)


def test_a_function_may_say_which_rows_it_cannot_score():
    @checks_rows(lambda row: row["answer"] / row["weight"])
    def marked(prompts, answers, rows):
        return [0.0 for _ in answers]

    check_row(marked, {"answer": 1, "weight": 2}, "d line 1", name="reward.fn m:f")
    check_row(lambda prompts, answers, rows: [], {}, "d line 1", name="reward.fn m:f")
    for row, message in (
        ({}, "no key 'answer'"),
        ({"answer": 1, "weight": 0}, "division by zero"),
        ({"answer": "a", "weight": 1}, "unsupported operand"),
    ):
        with pytest.raises(ValueError, match=f"^d line 1: reward.fn m:f cannot score this row: {message}.*; mend the"):
            check_row(marked, row, "d line 1", name="reward.fn m:f")
