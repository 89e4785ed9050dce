"""Rows in turns: what they are made of, that nothing but their numbers decides what is drawn, and how they end."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from realjax.core.axes import generate_rules
from realjax.core.generation_config import GenerationConfig
from realjax.dataflow.turns import Turns
from realjax.engine.batching import Batcher, Request, generate
from realjax.environments.environment import Environment
from realjax.models.config import LayerKind, MoEConfig
from realjax.runtime.ahead import continue_talks
from realjax.runtime.dialogues import Dialogue
from realjax.runtime.flight import Row, dump_rows, load_rows
from realjax.runtime.turns import Talks, converse, make_calls
from tests.engine.generation_cases import make_programs
from tests.given.models import make_layout, make_model, place_params, random_tree

pytestmark = pytest.mark.usefixtures("quick")
ENDS = range(6, 16)
CONFIG = GenerationConfig(max_new_tokens=10, top_k=30, top_p=0.95)
SAID = [17, 18, 19]  # tokens of what the environment says, in front of the number of the turn


class NumberTemplate:
    """Messages whose content are numbers of tokens."""

    def open(self, messages, row_id) -> list[int]:
        return [1, *(int(token) for message in messages for token in message["content"].split())]

    def follow(self, rounds, last_token, row_id) -> list[int]:
        return [*SAID, *(int(token) for message in rounds[-1] for token in message["content"].split())]

    def read(self, answer) -> str:
        return " ".join(map(str, answer))


@dataclass
class Scripted(Environment):
    """Goes on for as many turns as the row says, and gives the turn's number as its reward."""

    before_fn: Callable[["Scripted"], None] = lambda self: None
    turn: int = 0
    seen: list[str] = field(default_factory=list)

    def reset(self, prompt):
        self.prompt = prompt
        return [{"role": "user", "content": prompt["prompt"]}]

    def step(self, answer):
        self.before_fn(self)
        self.turn += 1
        self.seen.append(answer)
        is_done = self.turn == self.prompt["turns"]
        return [{"role": "user", "content": str(20 + self.turn)}], float(self.turn), is_done


ROWS = [{"prompt": f"{i + 2} 3", "turns": 1 + i % 3} for i in range(6)]
REQUESTS = [Request(tokens=np.array([5]), row_id=i, sample_id=s) for i in range(6) for s in range(2)]


@pytest.fixture(scope="module")
def setup():
    model, layout = make_model(), make_layout()
    programs = make_programs(model, CONFIG, layout, num_slots=4, eos=ENDS)
    return programs, place_params(model, random_tree(model, 0, 0.4), layout, generate_rules(layout.strategy))


def make_turns(make_fn: Callable[[], Environment] = Scripted, **limits: Any) -> Turns:
    template: Any = NumberTemplate()
    numbers: Any = {"max_turns": 4, "max_tokens": 100} | limits
    return Turns(make_fn=make_fn, rows=ROWS, template=template, **numbers)


def talk(setup, make_fn: Callable[[], Environment] = Scripted, **limits) -> list[Dialogue]:
    turns = make_turns(make_fn, **limits)
    return converse(Batcher(*setup), REQUESTS, turns, 7, make_calls(turns))


def parts(row: Dialogue) -> list[tuple[bool, list[int]]]:
    """Returns a row's parts after its prompt: whether each was drawn, and its tokens."""
    tokens, is_drawn = row.generation.tokens, row.is_drawn
    edges = np.flatnonzero(np.diff(is_drawn.astype(int))) + 1
    split = zip(np.split(is_drawn, edges), np.split(tokens, edges), strict=True)
    return [(bool(mask[0]), part.tolist()) for mask, part in split]


@pytest.fixture(scope="module")
def plain(setup) -> list[Dialogue]:
    return talk(setup)


def test_a_row_is_what_was_drawn_and_what_was_said(setup, plain):
    for row, request in zip(plain, REQUESTS, strict=True):
        assert row.prompt.tolist() == [1, request.row_id + 2, 3] and row.failure is None
        found = parts(row)
        assert [drawn for drawn, _ in found] == [i % 2 == 0 for i in range(len(found))]
        said = [tokens for drawn, tokens in found if not drawn]
        assert said == [[*SAID, 21 + turn] for turn in range(len(said))]
        assert not row.generation.logprobs[~row.is_drawn].any() and not row.generation.kept[~row.is_drawn].any()
        assert row.generation.logprobs[row.is_drawn].mean() < 0
        ends = np.cumsum([len(tokens) for _, tokens in found])[::2] - 1
        expected = np.zeros(len(row.is_drawn))
        expected[ends] = np.arange(1, row.num_turns + 1)
        np.testing.assert_array_equal(row.rewards, expected)
    assert {row.num_turns for row in plain} == {1, 2, 3}
    assert any(not row.generation.ended for row in plain)  # an answer that was cut off is the last


def test_every_turn_is_drawn_as_if_it_were_alone(setup, plain):
    """From the row's tokens as they are, with randomness of its own."""
    programs, params = setup
    row, request = max(zip(plain, REQUESTS, strict=True), key=lambda pair: pair[0].num_turns)
    context = row.prompt.tolist()
    drawn = [tokens for is_drawn, tokens in parts(row) if is_drawn]
    for turn, (is_drawn, tokens) in enumerate(parts(row)):
        if is_drawn:
            one = replace(request, tokens=np.array(context), sample_id=4 * request.sample_id + turn // 2)
            assert generate(programs, params, [one])[0].tokens.tolist() == tokens
        context += tokens
    assert len(drawn) > 1 and drawn[0][:3] != drawn[1][:3]


def test_experts_are_those_that_each_answer_was_drawn_with():
    moe = MoEConfig(num_experts=4, experts_per_token=2, expert_size=8)
    model, layout = make_model(pattern=(LayerKind(name="sparse", feed_forward=moe),)), make_layout()
    programs = make_programs(model, CONFIG, layout, num_slots=4, eos=ENDS, records_routes=True)
    params = place_params(model, random_tree(model, 0, 0.4), layout, generate_rules(layout.strategy))
    found = talk((programs, params))
    row, request = max(zip(found, REQUESTS, strict=True), key=lambda pair: pair[0].num_turns)
    routes, context, num_known = row.generation.routes, row.prompt.tolist(), 0
    assert routes is not None and len(routes) == len(row.prompt) + len(row.generation.tokens) and row.num_turns > 1
    for turn, (is_drawn, tokens) in enumerate(parts(row)):
        if is_drawn:
            one = replace(request, tokens=np.array(context), sample_id=4 * request.sample_id + turn // 2)
            alone = generate(programs, params, [one])[0].routes
            assert alone is not None
            np.testing.assert_array_equal(routes[num_known : len(alone) - 1], alone[num_known:-1])
            num_known = len(alone) - 1
        context += tokens
    assert num_known == len(routes) - 1 and not routes[-1].any() and routes[:-1].any(axis=1).all()
    none = talk((programs, params), Broken, step_seconds=0.3, max_retries=0)[0]
    assert none.generation.routes is not None
    assert none.generation.routes.shape == (len(none.prompt), routes.shape[1])


def test_when_environments_answer_changes_no_token(setup, plain):
    rng = np.random.default_rng(3)
    slow = talk(setup, lambda: Scripted(before_fn=lambda _: time.sleep(rng.random() * 0.03)))
    assert [row.generation.tokens.tolist() for row in slow] == [row.generation.tokens.tolist() for row in plain]


def test_the_slots_of_waiting_rows_serve_others(setup, plain):
    """The environments of as many rows as there are slots wait until all other rows have drawn an answer."""
    answered, others, all_answered = set[int](), 8, threading.Event()

    def before(one: Scripted) -> None:
        if int(one.prompt["prompt"].split()[0]) - 2 < 2:
            assert all_answered.wait(50)
            return
        answered.add(one.seed)
        if len(answered) == others:
            all_answered.set()

    found = talk(setup, lambda: Scripted(before_fn=before), max_retries=0)
    assert setup[0].num_slots == len(REQUESTS) - others == 4
    assert [row.generation.tokens.tolist() for row in found] == [row.generation.tokens.tolist() for row in plain]


def test_seeds_follow_from_the_row(setup):
    seeds: list[list[int]] = []
    for _ in range(2):
        made: list[Scripted] = []

        def make(made: list[Scripted] = made) -> Scripted:
            made.append(Scripted())
            return made[-1]

        talk(setup, make)
        seeds.append(sorted(one.seed for one in made))
    assert seeds[0] == seeds[1] and len(set(seeds[0])) == len(REQUESTS)


def test_limits_end_rows_as_cut_off(setup, plain):
    for row, whole in zip(talk(setup, max_turns=1), plain, strict=True):
        assert row.num_turns == 1 and row.generation.ended == (whole.generation.ended and whole.num_turns == 1)
    short = talk(setup, max_tokens=16)
    assert all(len(row.prompt) + len(row.generation.tokens) <= 16 and row.failure is None for row in short)
    assert any(row.num_turns < whole.num_turns for row, whole in zip(short, plain, strict=True))
    assert all(row.is_drawn[-1] for row in short)


@pytest.mark.parametrize("sizes", [{"dp": 2}, {"pp": 2}], ids=str)
def test_rows_are_the_same_on_other_layouts(plain, sizes):
    model, layout = make_model(), make_layout(**sizes)
    programs = make_programs(model, CONFIG, layout, num_slots=4, eos=ENDS)
    params = place_params(model, random_tree(model, 0, 0.4), layout, generate_rules(layout.strategy))
    for row, whole in zip(talk((programs, params)), plain, strict=True):
        np.testing.assert_array_equal(row.generation.tokens, whole.generation.tokens)
        np.testing.assert_allclose(row.generation.logprobs, whole.generation.logprobs, rtol=0, atol=1e-5)


def raise_for(rows: Sequence[int], tries: dict[int, int], most: int) -> Callable[[Scripted], None]:
    def before(one: Scripted) -> None:
        row = int(one.prompt["prompt"].split()[0]) - 2
        if row in rows and one.turn == 0 and tries.setdefault(one.seed, 0) < most:
            tries[one.seed] += 1
            raise OSError("the network is down")

    return before


def test_a_row_that_fails_is_begun_again_and_is_then_as_any_other(setup, plain):
    tries: dict[int, int] = {}
    found = talk(setup, lambda: Scripted(before_fn=raise_for(range(6), tries, 1)))
    assert [row.num_retries for row in found] == [1] * len(REQUESTS)
    for row, whole in zip(found, plain, strict=True):
        np.testing.assert_array_equal(row.generation.tokens, whole.generation.tokens)
        np.testing.assert_array_equal(row.rewards, whole.rewards)


def test_what_fails_for_ever_is_failed_and_costs_no_other_row(setup, plain, caplog):
    found = talk(setup, lambda: Scripted(before_fn=raise_for([2, 3], {}, 99)))
    for row, whole, request in zip(found, plain, REQUESTS, strict=True):
        if request.row_id in (2, 3):
            assert row.failure == "it raised OSError: the network is down" and row.num_retries == 1
            assert not row.generation.ended and row.arrays()["env_failed"]
        else:
            np.testing.assert_array_equal(row.generation.tokens, whole.generation.tokens)
    assert "of 12 rows failed, each in 2 tries" in caplog.text and "the network is down" in caplog.text


class Forgetful(Scripted):
    """Says something else than the environments of before."""

    def step(self, answer):
        _, reward, is_done = super().step(answer)
        return [{"role": "user", "content": "77"}], reward, is_done


@pytest.mark.parametrize("kind", ["kept", "continued", "changed"])
def test_rows_that_are_interrupted_end_as_others(kind, setup, plain):
    """Also where all that is left of them is what was drawn, and environments are asked anew; if these say something
    else then, a row is begun again.
    """
    rows = [Row(step=i // 4, request=request) for i, request in enumerate(REQUESTS)]
    turns, num_begun = make_turns(), 0
    talks = Talks(turns, 7, make_calls(turns))
    for target in range(3):
        if target and kind != "kept":
            rows = load_rows(dump_rows(rows))
            turns = make_turns(Forgetful) if kind == "changed" else turns
            talks = Talks(turns, 7, make_calls(turns))
        left = [row for row in rows if row.generation is None]
        continued = iter(continue_talks(talks, Batcher(*setup, chunk_len=2), left, target, version=target, num_rows=4))
        rows = [next(continued) if row.generation is None else row for row in rows]
        assert all(row.generation is not None for row in rows if row.step <= target)
        num_begun += sum(row.generation is None and row.dialogue is not None for row in rows)
    assert num_begun > 0 and any(len(set(row.versions)) > 1 for row in rows)
    for row, expected in zip(rows, plain, strict=True):
        found = row.dialogue
        assert found is not None and found.failure is None and len(row.versions) == len(found.generation.tokens)
        if kind == "changed":
            continue
        for name in ("prompt", "is_drawn", "rewards"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        for name in ("tokens", "kept"):
            np.testing.assert_array_equal(getattr(found.generation, name), getattr(expected.generation, name))
        assert (found.num_turns, found.generation.ended) == (expected.num_turns, expected.generation.ended)
    retries = {row.dialogue.num_retries for row in rows if row.dialogue is not None}
    assert retries == ({0, 1} if kind == "changed" else {0})


class Broken(Scripted):
    """One row's environment never begins, another's hangs, and two return what is none."""

    def reset(self, prompt):
        row = int(prompt["prompt"].split()[0]) - 2
        if row == 0:
            raise RuntimeError("no room")
        if row == 1:
            time.sleep(3)
        return {2: None, 3: [{"role": "user", "content": "2 " * 99}]}.get(row, super().reset(prompt))


def test_an_environment_that_does_not_begin_leaves_rows_without_an_answer(setup):
    found = talk(setup, Broken, step_seconds=0.3, max_retries=0)
    reasons = [row.failure or "" for row in found[::2]]
    for reason, words in zip(
        reasons, ("no room", "longer than 0.3", "reset returned is None", "have 100"), strict=False
    ):
        assert words in reason
    assert reasons[4:] == ["", ""]
    assert found[0].prompt.tolist() == [5] and not len(found[0].generation.tokens)
    none, some = found[0].generation.kept, found[-1].generation.kept
    assert none is not None and some is not None and none.shape == (0, some.shape[1])
