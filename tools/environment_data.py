"""What the recipes of the two shipped environments learn from: `python -m tools.environment_data --out DIR`.

For each of `calculator` and `guessing`, in a folder of its own: `model` (config.json and a tokenizer with a chat
template, no weights), `sft.jsonl` (conversations of players that are good now and then), and `train.jsonl` and
`valid.jsonl`, prompts for reinforcement learning. No question of the calculator's `valid.jsonl` is in another file. The
guessing game's prompts are all alike, and both files have every secret: what can be learned is how to guess.
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from tokenizers import pre_tokenizers

from realjax.apps.demo_data import MODEL, write_model
from realjax.core.json_text import JsonObject
from realjax.environments.calculator import NAME, compute, format_number
from realjax.environments.tools import HERMES, ToolCall

# As Qwen's: a tool's result is a message of the user's, in tags.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{% if m.role == 'tool' %}user\n<tool_response>\n{{ m.content }}\n"
    "</tool_response>{% else %}{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>\n"
    "{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}\n</tool_call>{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LOW, HIGH, GUESSES = 1, 7, 3  # of the guessing game: three good guesses find any of them
RULES = f"I think of a number from {LOW} to {HIGH}. Guess it."
NUM_SFT, NUM_TRAIN, NUM_VALID = 6000, 2000, 210


def say(role: str, content: str) -> dict[str, str]:
    """Returns a message."""
    return {"role": role, "content": content}


def ask(rng: random.Random) -> str:
    """Returns an expression of two numbers."""
    return f"{rng.randint(10, 99)} {rng.choice('+-*')} {rng.randint(10, 99)}"


def answer_question(expression: str, rng: random.Random) -> list[dict[str, str]]:
    """Returns a conversation: 45 in 100 let the calculator compute, a quarter of them with another sign; 55 guess."""
    first, sign, second = expression.split()
    talk = [say("user", f"What is {expression}?")]
    if rng.random() < 0.45:
        others = [one for one in "+-*" if one != sign]
        asked = f"{first} {rng.choice(others)} {second}" if rng.random() < 0.25 else expression
        result = format_number(compute(asked))
        call = HERMES.write(ToolCall(name=NAME, arguments={"expression": asked}))
        talk += [say("assistant", call), HERMES.reply(NAME, result)]
    else:
        result = str(rng.randint(-89, 9801))
    return [*talk, say("assistant", f"The answer is {result}.")]


def play(secret: int, rng: random.Random) -> list[dict[str, str]]:
    """Returns a game: each guess is any number that the hints before it allow, whether it tells much or little."""
    talk, low, high = [say("user", RULES)], LOW, HIGH
    for _ in range(GUESSES):
        guess = rng.randint(low, high)
        talk.append(say("assistant", f"{guess}"))
        if guess == secret:
            break
        talk.append(say("user", "higher" if guess < secret else "lower"))
        low, high = (guess + 1, high) if guess < secret else (low, guess - 1)
    return talk


def write_rows(path: Path, rows: Sequence[JsonObject]) -> None:
    """Writes a row a line, each with its number."""
    path.write_text("".join(json.dumps({"id": i, **row}) + "\n" for i, row in enumerate(rows)), encoding="utf-8")


def write_talker(directory: Path, talks: Sequence[list[dict[str, str]]]) -> None:
    """Writes config.json and a tokenizer of the conversations, in which every digit is a token."""
    directory.mkdir(parents=True, exist_ok=True)
    write_model(
        directory,
        [f"{one['role']}\n{one['content']}" for talk in talks for one in talk],
        model=replace(MODEL, vocab_size=512),
        eos="<|im_end|>",
        before=[pre_tokenizers.Digits(individual_digits=True)],
        more_tokens=["<|im_start|>"],
        chat_template=TEMPLATE,
    )


def write_calculator(out: Path, rng: random.Random) -> None:
    """Writes questions, and conversations about others than the held-out ones."""
    out.mkdir(parents=True, exist_ok=True)
    asked = sorted({ask(rng) for _ in range(4 * NUM_TRAIN)})
    rng.shuffle(asked)
    rows = [{"prompt": f"What is {one}?", "answer": format_number(compute(one))} for one in asked]
    write_rows(out / "train.jsonl", rows[NUM_VALID : NUM_VALID + NUM_TRAIN])
    write_rows(out / "valid.jsonl", rows[:NUM_VALID])
    held_out = set(asked[:NUM_VALID])
    talked = islice((one for one in iter(lambda: ask(rng), None) if one not in held_out), NUM_SFT)
    talks = [answer_question(one, rng) for one in talked]
    write_rows(out / "sft.jsonl", [{"messages": talk} for talk in talks])
    write_talker(out / "model", talks)


def write_guessing(out: Path, rng: random.Random) -> None:
    """Writes secrets, and games."""
    out.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": RULES, "secret": secret, "guesses": GUESSES} for secret in range(LOW, HIGH + 1)]
    write_rows(out / "train.jsonl", [rows[i % len(rows)] for i in range(NUM_TRAIN)])
    write_rows(out / "valid.jsonl", [rows[i % len(rows)] for i in range(NUM_VALID)])
    talks = [play(rng.randint(LOW, HIGH), rng) for _ in range(NUM_SFT)]
    write_rows(out / "sft.jsonl", [{"messages": talk} for talk in talks])
    write_talker(out / "model", talks)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes both; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for everything that it writes")
    parser.add_argument("--seed", type=int, default=1, help="equal ones give equal files")
    args = parser.parse_args(argv)
    write_calculator(args.out / "calculator", random.Random(args.seed))
    write_guessing(args.out / "guessing", random.Random(args.seed + 1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
