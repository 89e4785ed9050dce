"""The shipped environments, and how an environment is named."""

from fractions import Fraction

import pytest

from realjax.environments.calculator import Calculator, compute, find_number, format_number
from realjax.environments.environment import load_environment, read_messages, read_step
from realjax.environments.guessing import GuessingGame
from realjax.environments.tools import HERMES, ToolCall


def call(expression: str, name: str = "calculator") -> str:
    return HERMES.write(ToolCall(name=name, arguments={"expression": expression}))


def test_a_calculator_computes_and_judges():
    calculator = Calculator()
    assert calculator.reset({"prompt": "7*8?", "answer": "56"}) == [{"role": "user", "content": "7*8?"}]
    messages, reward, done = calculator.step("I compute. " + call("7*8"))
    assert (reward, done) == (0.0, False) and messages[0]["content"] == "<tool_response>\n56\n</tool_response>"
    assert calculator.step("It is 56.") == ([], 1.0, True)
    assert calculator.step("It is 57.") == calculator.step("no idea") == ([], 0.0, True)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [("1+2*3", "7"), ("-(4-6)/8", "0.25"), ("1/3", "0.333333"), (" 12 * 12 ", "144"), ("0.1+0.2", "0.3")],
)
def test_expressions_have_their_values(expression, expected):
    assert format_number(compute(expression)) == expected


@pytest.mark.parametrize(
    "expression", ["1/0", "9**9**9", "x+1", "__import__('os')", "1+", "", "(" * 150, "1" * 201, "1e400", "'a'*9"]
)
def test_what_has_no_value_is_told_to_the_model(expression):
    calculator = Calculator()
    calculator.reset({"prompt": "?", "answer": "1"})
    messages, reward, done = calculator.step(call(expression))
    assert "error: " in messages[0]["content"] and (reward, done) == (0.0, False)


def test_another_tool_is_not_there():
    calculator = Calculator()
    calculator.reset({"prompt": "?", "answer": 1})
    assert "there is no tool abacus" in calculator.step(call("1", name="abacus"))[0][0]["content"]
    with pytest.raises(ValueError, match="found the answer 'many'"):
        calculator.reset({"prompt": "?", "answer": "many"})


def test_numbers_are_the_last_ones():
    assert find_number("3 and -4.50") == Fraction(-9, 2) and find_number("none") is None


def test_a_game_says_where_the_number_is():
    game = GuessingGame()
    assert game.reset({"prompt": "guess", "secret": 5, "guesses": 3}) == [{"role": "user", "content": "guess"}]
    assert game.step("perhaps 3") == ([{"role": "user", "content": "higher"}], 0.0, False)
    assert game.step("well") == ([{"role": "user", "content": "that is no number"}], 0.0, False)
    assert game.step("7")[1:] == (0.0, True)
    game.reset({"prompt": "guess", "secret": 5})
    assert game.step("1, 5") == ([], 1.0, True)
    with pytest.raises(ValueError, match="found the secret '5'"):
        game.reset({"prompt": "guess", "secret": "5"})


class Plain:
    def reset(self, prompt):
        return []

    def step(self, answer):
        return [], 0, True


class Lame:
    def reset(self):
        return []

    step = reset


def test_environments_are_named_by_module_and_class():
    assert load_environment("realjax.environments.guessing:GuessingGame") is GuessingGame
    assert load_environment("tests.environments.test_shipped:Plain").__name__ == "Plain"
    for path, message in (
        ("realjax", "it needs <module>:<Class>"),
        ("realjax.environments.guessing:Chess", "names nothing"),
        ("realjax.environments.guessing:WHOLE", "names a Pattern"),
        ("tests.environments.test_shipped:Lame", "reset of .* takes"),
        ("fractions:Fraction", "has no method reset"),
        ("realjax.environments.nowhere:X", "cannot be found"),
    ):
        with pytest.raises(ValueError, match=rf"^env.path: .*{message}"):
            load_environment(path)


@pytest.mark.parametrize(
    "found",
    [None, ([], 1.0), ([], float("nan"), True), ([], "much", True), ("text", 0, False), ([{"role": 1}], 0, False)],
)
def test_what_is_no_step_is_refused(found):
    with pytest.raises(ValueError, match="what step returned"):
        read_step(found, "what step returned")


def test_the_last_messages_are_not_read():
    assert read_step((None, 1, True), "it") == ([], 1.0, True)
    with pytest.raises(ValueError, match="it holds"):
        read_messages([{"role": "user"}], "it")
