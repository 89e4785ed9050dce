"""A game of several turns: the model guesses a number, and is told whether the one looked for is higher or lower.

The data's rows have `prompt`, the game's rules, and `secret`, the number. `guesses` may say how many there are (4). The
number found is worth 1, a game without it 0.
"""

import re

from realjax.core.json_text import JsonObject
from realjax.environments.environment import Environment, Messages, Step

WHOLE = re.compile(r"-?\d+")
GUESSES = 4


class GuessingGame(Environment):
    """Guess the number: what is said to a guess is `higher`, `lower`, or that it was no number."""

    def reset(self, prompt: JsonObject) -> Messages:
        """Returns the rules. Raises ValueError for a row without a whole number as its secret."""
        secret, guesses = prompt.get("secret"), prompt.get("guesses", GUESSES)
        if type(secret) is not int or type(guesses) is not int or guesses < 1:
            raise ValueError(f"found the secret {secret!r} and {guesses!r} guesses; they must be whole numbers")
        self.secret, self.left = secret, guesses
        rules = prompt["prompt"]
        return list(rules) if isinstance(rules, list) else [{"role": "user", "content": rules}]

    def step(self, answer: str) -> Step:
        """Returns the hint to the last number of an answer; done when it is right, or was the last guess."""
        numbers = WHOLE.findall(answer)
        guess = int(numbers[-1]) if numbers and len(numbers[-1]) < 20 else None
        self.left -= 1
        if guess == self.secret:
            return [], 1.0, True
        hint = "that is no number" if guess is None else "higher" if guess < self.secret else "lower"
        return [{"role": "user", "content": hint}], 0.0, self.left == 0
