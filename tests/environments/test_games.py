"""What the recipes of the two games learn from: good games among others, written as fine-tuning reads them."""

import json
import random
from collections.abc import Mapping

import pytest
from transformers import AutoTokenizer

from realjax.data.tokens import encode
from realjax.data.turns import TurnTemplate
from realjax.environments.calculator import Calculator, compute, format_number
from realjax.environments.environment import Environment
from realjax.environments.guessing import GuessingGame
from realjax.environments.tools import find_format
from tools.environment_data import GUESSES, HIGH, LOW, answer_question, ask, play, write_calculator, write_talker


def list_games(seed: int = 0, count: int = 60):
    rng = random.Random(seed)
    for _ in range(count):
        asked, secret = ask(rng), rng.randint(LOW, HIGH)
        yield Calculator(), {"answer": format_number(compute(asked))}, answer_question(asked, rng)
        yield GuessingGame(), {"secret": secret, "guesses": GUESSES}, play(secret, rng)


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> TurnTemplate:
    folder = tmp_path_factory.mktemp("model")
    write_talker(folder, [talk for _, _, talk in list_games()])
    return TurnTemplate(tokenizer=AutoTokenizer.from_pretrained(folder))


def replay(environment: Environment, row: Mapping, talk: list, template: TurnTemplate) -> tuple[list[int], float]:
    """Returns the tokens of a conversation with the answers of another, and what it was worth."""
    environment.tool_format = find_format(template.render)
    rounds, end, total = (
        [environment.reset({"prompt": talk[0]["content"], **row})],
        template.tokenizer.eos_token_id,
        0.0,
    )
    tokens = template.open(rounds[0], 0)
    for message in talk[1::2]:
        tokens += [*encode([message["content"]], template.tokenizer, is_rendered=True)[0], end]
        messages, reward, done = environment.step(message["content"])
        total += reward
        if done:
            break
        rounds.append(messages)
        tokens += template.follow(rounds, end, 0)
    return tokens, total


def test_turns_are_written_as_fine_tuning_reads_them(template):
    worth: dict[type, list[float]] = {Calculator: [], GuessingGame: []}
    for environment, row, talk in list_games():
        tokens, total = replay(environment, row, talk, template)
        whole = encode([template.render(talk, False)], template.tokenizer, is_rendered=True)[0]
        assert tokens == whole[: len(tokens)] and len(whole) - len(tokens) < 12
        worth[type(environment)].append(total)
    # Some are won, and many are not: there is something to find, and something to learn.
    assert all(0.2 < sum(found) / len(found) < 0.85 for found in worth.values())


def test_held_out_questions_are_in_no_other_file(tmp_path):
    write_calculator(tmp_path, random.Random(1))
    read = lambda name: [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
    held_out = {row["prompt"] for row in read("valid.jsonl")}
    seen = {row["prompt"] for row in read("train.jsonl")} | {row["messages"][0]["content"] for row in read("sft.jsonl")}
    assert held_out and seen and not held_out & seen


def test_whoever_halves_what_is_left_wins_every_game():
    for secret in range(LOW, HIGH + 1):
        game, low, high = GuessingGame(), LOW, HIGH
        game.reset({"prompt": "guess", "secret": secret, "guesses": GUESSES})
        done = False
        while not done:
            guess = (low + high) // 2
            messages, reward, done = game.step(str(guess))
            hint = messages[0]["content"] if messages else ""
            low, high = (guess + 1, high) if hint == "higher" else (low, guess - 1)
        assert reward == 1.0
