"""Environments for tests, and a model's folder whose tokenizer has a chat template."""

import json
import shutil
from pathlib import Path

from realjax.environments.environment import Environment
from tests.given.runs import Given

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class Chatty(Environment):
    """Says `more` to two answers; each is worth its length."""

    num_steps = 0

    def reset(self, prompt):
        return [{"role": "user", "content": prompt["prompt"]}]

    def step(self, answer):
        self.num_steps += 1
        return [{"role": "user", "content": "more"}], len(answer) / 10, self.num_steps == 3


class Coin(Chatty):
    """Ends after an answer, which is worth 1 or 0 by chance."""

    def step(self, answer):
        return [], float(self.seed % 2), True


class Moody(Chatty):
    """Raises in one conversation of four, however often it is begun."""

    def step(self, answer):
        if self.seed % 4 == 0:
            raise ConnectionError("not today")
        return super().step(answer)


class Absent(Chatty):
    """Raises in every conversation but that which is begun to see whether it can be."""

    def step(self, answer):
        raise ConnectionError("nobody is there")


class PaysBoth(Environment):
    """Wants an answer that begins below `a`, and then one that begins with `a` or above."""

    worth = (1.0, 1.0)  # of each turn
    num_steps = 0

    def reset(self, prompt):
        return [{"role": "user", "content": prompt["prompt"]}]

    def step(self, answer):
        is_wanted = bool(answer) and (answer[0] >= "a") == (self.num_steps == 1)
        reward = is_wanted * self.worth[self.num_steps]
        self.num_steps += 1
        return [{"role": "user", "content": "more"}], reward, self.num_steps == 2


class PaysFirst(PaysBoth):
    """Pays for the first turn alone."""

    worth = (1.0, 0.0)


class PaysLast(PaysBoth):
    """Pays for the last turn alone."""

    worth = (0.0, 1.0)


def write_chat_models(given: Given, folder: Path) -> dict[str, Path]:
    """Writes actor and reference with a chat template; returns their folders as options of a run."""
    for name in ("actor", "ref"):
        shutil.copytree(given.folder / name, folder / name)
        path = folder / name / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
    return {"actor.path": folder / "actor", "ref.path": folder / "ref"}
