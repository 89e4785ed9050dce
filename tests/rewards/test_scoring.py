"""An answer that a function cannot score costs only itself, wherever the function runs; the others' order is kept."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from realjax.rewards.functions import Question
from realjax.rewards.scoring import UNASKED, Scorer, ScoringParameters, make_scorer
from tests.given import rewards

TROUBLES = {
    "raise": "it raised KeyError: 'no such thing', in line",
    "exit": "it raised SystemExit: 3",
    "nan": "it returned nan",
    "none": "it returned nan",
}
MODULE = "tests.given.rewards"
LIMIT = 0.3  # seconds


def make_question(*does: str) -> Question:
    """Returns a question about answers of different lengths, for each of which a function does one of these."""
    answers = ["a" * (i + 1) for i in range(len(does))]
    return Question(prompts=["p"] * len(does), answers=answers, rows=[{"does": one} for one in does])


def make(name: str, **options) -> Scorer:
    fn = getattr(rewards, name)
    return make_scorer(fn, ScoringParameters(**options), path=f"{MODULE}:{name}", name="reward.fn")


@pytest.fixture(scope="module")
def in_workers():
    """Two processes, which all tests share."""
    return {name: make(name, workers=2, timeout_s=LIMIT, retries=0) for name in ("troubled", "troubled_async_lists")}


def check(outcomes, question: Question, troubles: dict[str, str]) -> None:
    """Fails where an answer without trouble has not its length as its reward, or another one no reason."""
    for outcome, answer, row in zip(outcomes, question.answers, question.rows, strict=True):
        if (reason := troubles.get(row["does"])) is None:
            assert outcome == len(answer)
        else:
            assert isinstance(outcome, str) and outcome.startswith(reason), (row, outcome)


@pytest.mark.parametrize("retries", [0, 2])
@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("name", ["troubled", "troubled_lists", "troubled_async", "troubled_async_lists"])
def test_in_this_process_trouble_is_of_its_answer_alone(name, size, retries):
    question = make_question("", "raise", "", "nan", "none", "exit", "")
    check(make(name, retries=retries, batch_size=size).score(question), question, TROUBLES)


@pytest.mark.parametrize("name", ["troubled", "troubled_async_lists"])
def test_a_worker_that_hangs_or_dies_is_replaced_and_its_answer_alone_is_lost(in_workers, name):
    question = make_question("", "sleep", "", "raise", "", "die", "nan", "", "sleep", "", "")
    start = time.monotonic()
    troubles = TROUBLES | {
        "sleep": f"no reward within reward.timeout_s={LIMIT}",
        "die": "its process ended with code -11",
    }
    check(in_workers[name].score(question), question, troubles)
    assert time.monotonic() - start < 60  # two that sleep for an hour


def test_a_coroutine_that_takes_too_long_is_given_up_and_the_others_run_at_once():
    question = make_question(*["", "sleep"] * 40)
    start = time.monotonic()
    outcomes = make("troubled_async", timeout_s=1.0, retries=0, concurrency=80).score(question)
    check(outcomes, question, {"sleep": "no reward within reward.timeout_s=1"})
    assert time.monotonic() - start < 20  # one after the other they would take 40


def test_no_more_coroutines_are_under_way_than_asked_for():
    under_way, most = 0, 0

    async def count(prompt, answer, row):
        nonlocal under_way, most
        import asyncio

        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.01)
        under_way -= 1
        return 0.0

    scorer = make_scorer(count, ScoringParameters(concurrency=3), path="m:f", name="reward.fn")
    assert scorer.score(make_question(*[""] * 12)) == [0.0] * 12 and most == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_an_answer_is_asked_about_again_as_often_as_allowed(tmp_path, workers):
    for retries, expected in ((0, False), (1, True)):
        seen = tmp_path / f"{retries}-{workers}"
        rows = [{"seen": str(seen)} for _ in range(3)]
        question = Question(prompts=["p"] * 3, answers=["a", "b", "c"], rows=rows)
        outcomes = make("flaky", retries=retries, workers=workers).score(question)
        assert [outcome == 1.0 for outcome in outcomes] == [expected] * 3


def test_workers_have_no_jax_and_see_no_device_and_are_kept():
    scorer = make("tell_process", workers=2)
    first, second = (scorer.score(make_question(*[""] * 20)) for _ in range(2))
    assert {os.getpid()}.isdisjoint(first) and 1 <= len({*first, *second}) <= 2
    assert not any(isinstance(outcome, str) for outcome in (*first, *second)), first


def test_a_worker_without_the_function_says_so():
    scorer = make_scorer(rewards.oddness, ScoringParameters(workers=1), path="no_such:f", name="reward.fn")
    with pytest.raises(
        ValueError, match=r"^reward.fn: the module of 'no_such:f' cannot be found; .* of reward.workers"
    ):
        scorer.score(make_question(""))


def test_workers_end_with_their_parent(tmp_path: Path):
    """Killed without a chance to clean up, while a worker hangs."""
    code = (
        "import os, signal, threading, time\n"
        "from tests.rewards.test_scoring import make, make_question\n"
        "scorer = make('tell_process', workers=1)\n"
        "print(int(scorer.score(make_question(''))[0]), flush=True)\n"
        "threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()\n"
        "make('troubled', workers=1).score(make_question('sleep'))\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert process.returncode == -9, process.stderr
    worker, deadline = Path(f"/proc/{process.stdout.strip()}"), time.monotonic() + 60
    while worker.exists() and "Z" not in (worker / "stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("bad", [np.inf, 1e300, -np.inf])
def test_a_reward_that_float32_cannot_hold_is_none(bad):
    scorer = make_scorer(lambda *_: [bad, 1.0], ScoringParameters(), path="m:f", name="reward.fn")
    assert scorer.score(make_question("", "")) == [f"it returned {bad}", 1.0]


def test_a_question_about_nothing_has_no_answer():
    assert make("troubled_lists").score(make_question()) == []


@pytest.mark.parametrize("name", ["troubled", "troubled_async", "in workers"])
def test_nothing_more_is_asked_once_too_many_have_no_reward(name):
    """And what has been asked costs the time limit in as few rounds as it takes to be sure."""
    options = {"workers": 2, "timeout_s": LIMIT} if name == "in workers" else {"concurrency": 2}
    scorer = make("troubled" if name == "in workers" else name, retries=1, **options)
    does = "sleep" if name == "in workers" else "raise"
    start = time.monotonic()
    outcomes = scorer.score(make_question(*[does] * 3, *[""] * 40, *[does] * 30), most_failed=2)
    reasons = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert not [outcome for outcome in outcomes[:3] if outcome == UNASKED] and outcomes[-1] == UNASKED
    assert len(reasons) > 30 and time.monotonic() - start < 30
    few = scorer.score(make_question(does, *[""] * 4, does), most_failed=2)
    assert [isinstance(outcome, str) for outcome in few] == [True, *[False] * 4, True] and UNASKED not in few
