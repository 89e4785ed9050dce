"""Arithmetic with a calculator: the model may call the tool, sees its result, and answers with the number.

The data's rows have `prompt`, a question, and `answer`, its number: the right answer is worth 1, any other 0. It is
also the pattern for tools of your own.
"""

import ast
import operator
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import ClassVar

from realjax.core.json_text import JsonObject
from realjax.environments.environment import Environment, Messages, Step
from realjax.environments.tools import ToolCall

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
# Longer ones are no arithmetic that anybody asks for, and a power of powers would keep a machine busy for ever.
LONGEST, LARGEST = 200, 10**30
NAME = "calculator"
OPERATIONS: Mapping[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class Calculator(Environment):
    """A question of arithmetic, and a calculator for + - * / and brackets."""

    tools: ClassVar = (
        {
            "type": "function",
            "function": {
                "name": NAME,
                "description": "Computes an expression of numbers, + - * / and brackets.",
                "parameters": {
                    "type": "object",
                    "properties": {"expression": {"type": "string"}},
                    "required": ["expression"],
                },
            },
        },
    )

    def reset(self, prompt: JsonObject) -> Messages:
        """Returns the question. Raises ValueError for a row whose `answer` is no number."""
        self.answer = find_number(str(prompt.get("answer", "")))
        if self.answer is None:
            raise ValueError(
                f"found the answer {prompt.get('answer')!r}; the calculator needs rows with a number there"
            )
        asked = prompt["prompt"]
        return list(asked) if isinstance(asked, list) else [{"role": "user", "content": asked}]

    def step(self, answer: str) -> Step:
        """Returns the results of the calls in an answer; without any, what the answer's last number is worth."""
        if calls := self.tool_format.find_calls(answer):
            return [self.tool_format.reply(call.name, answer_call(call)) for call in calls], 0.0, False
        return [], float(find_number(answer) == self.answer), True


def find_number(text: str) -> Fraction | None:
    """Returns the last number of a text; None without any."""
    found = NUMBER.findall(text)
    return Fraction(found[-1]) if found else None


def answer_call(call: ToolCall) -> str:
    """Returns the result of a call as a text, or what is wrong with it, for the model to read."""
    if call.name != NAME:
        return f"error: there is no tool {call.name}"
    try:
        return format_number(compute(str(call.arguments.get("expression", ""))))
    except (ValueError, ArithmeticError, SyntaxError, RecursionError, MemoryError) as error:
        return f"error: {error}"


def compute(expression: str) -> Fraction:
    """Returns the value of an expression. Raises ValueError, ArithmeticError or SyntaxError for one without a value."""
    if len(expression) > LONGEST:
        raise ValueError("the expression is too long")
    return _evaluate(ast.parse(expression.strip(), mode="eval").body)


def _evaluate(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = Fraction(str(node.value))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = -_evaluate(node.operand)
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        value = OPERATIONS[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    else:
        raise ValueError("only numbers, + - * / and brackets are known")
    if abs(value) > LARGEST:
        raise ValueError("the number is too large")
    return value


def format_number(value: Fraction) -> str:
    """Returns a number as people write it: whole where it is, else with up to six decimals."""
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.6f}".rstrip("0")
