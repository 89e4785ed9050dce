"""Verifiers: whether an answer is right, by what its row of the data says. Each is a `reward.fn`, of one answer.

1 is right and 0 is not. What a verifier needs of a row is checked before the run begins.
"""

import importlib
import importlib.util
import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from realjax.rewards.functions import Row, checks_rows

EXTRA = "pip install 'realjax[verifiers]'"
MARK = "####"  # before the result, in answers of GSM8K
LATEX_SIGNS = ("$", "\\(", "\\[", "\\boxed")
FENCED = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)
THOUGHT = re.compile(r"\s*<think>(?:(?!</?think>).)*</think>\s*<answer>(?:(?!</?answer>).)*</answer>\s*", re.DOTALL)


def _import(name: str, what: str) -> ModuleType:
    """Returns a module of the extra. Raises ValueError, saying what needs it, where it is not installed."""
    if importlib.util.find_spec(name) is None:
        raise ValueError(f"{what} needs the package {name}, which is not installed; run `{EXTRA}`")
    return importlib.import_module(name)


def _text(row: Row, key: str, needed: str) -> str:
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        raise ValueError(f"found {value!r} as {key}; {needed}")
    return str(value)


def _read_math(row: Row) -> list[Any]:
    """Returns the expressions of a row's `answer`, which is LaTeX with or without dollars; of GSM8K, what ends it."""
    text = _text(row, "answer", "math_reward needs a number or LaTeX").rpartition(MARK)[2].strip()
    expressions = _parse(text if any(sign in text for sign in LATEX_SIGNS) else f"${text}$")
    if not expressions:
        raise ValueError(f"found the answer {text!r}; math_reward needs a number or LaTeX that math-verify can read")
    return expressions


def _parse(text: str) -> list[Any]:
    math_verify = _import("math_verify", "math_reward")
    # Its own time limits work in a main thread alone, and say so each time; those of reward.workers work anywhere.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return math_verify.parse(text, parsing_timeout=None)


@checks_rows(_read_math)
def math_reward(prompt: str, answer: str, row: Row) -> float:
    """Returns 1 where the answer's last formula or number equals the row's `answer`, however both are written.

    By math-verify (extra `verifiers`): LaTeX, fractions, sets, intervals, equations; percent and units are read too.
    """
    gold, found = _read_math(row), _parse(answer)
    return float(_import("math_verify", "math_reward").verify(gold, found, timeout_seconds=None))


def _read_accepted(row: Row) -> list[str]:
    """Returns the texts of a row's `answer`, which is one or a list of them."""
    answer = row["answer"]
    texts = [str(one) for one in (answer if isinstance(answer, list) else [answer])]
    if not texts or not all(texts) or isinstance(answer, dict):
        raise ValueError(f"found the answer {answer!r}; exact_reward needs a text, or a list of those that are right")
    return [_squeeze(text) for text in texts]


def _squeeze(text: str) -> str:
    return " ".join(text.split())


@checks_rows(_read_accepted)
def exact_reward(prompt: str, answer: str, row: Row) -> float:
    """Returns 1 where the answer is the row's `answer`, or one of a list of them, but for the white space."""
    return float(_squeeze(answer) in _read_accepted(row))


def _read_pattern(row: Row) -> re.Pattern[str]:
    pattern = _text(row, "pattern", "regex_reward needs a regular expression")
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"found the pattern {pattern!r}, which is no regular expression ({error})") from error


@checks_rows(_read_pattern)
def regex_reward(prompt: str, answer: str, row: Row) -> float:
    """Returns 1 where the row's `pattern` is found in the answer. It is Python's, and a dot is any character."""
    return float(_read_pattern(row).search(answer) is not None)


def _read_schema(row: Row) -> Any:
    """Returns the validator of a row's `schema`, an object or its text."""
    jsonschema = _import("jsonschema", "json_reward")
    schema = row["schema"]
    schema = json.loads(schema) if isinstance(schema, str) else schema
    if not isinstance(schema, Mapping):
        raise ValueError(f"found {schema!r} as schema; json_reward needs a JSON schema")
    kind = jsonschema.validators.validator_for(schema)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"found a schema that is none ({error.message})") from error
    return kind(schema)


@checks_rows(_read_schema)
def json_reward(prompt: str, answer: str, row: Row) -> float:
    """Returns 1 where the answer, or its only block in ``` fences, is JSON that fits the row's `schema`."""
    blocks = FENCED.findall(answer)
    try:
        value = json.loads(blocks[0] if len(blocks) == 1 else answer)
    except ValueError:
        return 0.0
    return float(_read_schema(row).is_valid(value))


def _read_bounds(row: Row) -> tuple[float, float]:
    """Returns the fewest and the most words that a row allows."""
    bounds = row.get("min_words", 0), row.get("max_words", math.inf)
    are_numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in bounds)
    if not are_numbers or not {"min_words", "max_words"} & row.keys() or bounds[0] > bounds[1]:
        raise ValueError(f"found min_words={bounds[0]} and max_words={bounds[1]}; length_reward needs one of them")
    return bounds


@checks_rows(_read_bounds)
def length_reward(prompt: str, answer: str, row: Row) -> float:
    """Returns 1 where the answer has from the row's `min_words` to its `max_words` words, ends included."""
    least, most = _read_bounds(row)
    return float(least <= len(answer.split()) <= most)


def format_reward(prompt: str, answer: str, row: Row) -> float:
    """Returns 1 where the answer is `<think>...</think>` and `<answer>...</answer>`, each once, and nothing else."""
    # A template may have written the first tag: then it ends the prompt.
    opened = "<think>" if prompt.rstrip().endswith("<think>") else ""
    return float(THOUGHT.fullmatch(opened + answer) is not None)


# By their names, for whoever lists them.
VERIFIERS: Mapping[str, Callable[[str, str, Row], float]] = {
    fn.__name__: fn for fn in (math_reward, exact_reward, regex_reward, json_reward, length_reward, format_reward)
}
