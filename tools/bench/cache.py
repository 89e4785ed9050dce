"""Room of a key-value cache against the tokens in it, by the way in which the cache grows. No model is run.

    python -m tools.bench.cache

512 answers, 128 at a time, put into slots as `engine/batching.py` does. All slots have room for as many tokens.
`powers`: the next of 128, 256, 512, ...; `capped`: no more than a row can come to, as the engine does it; `halves` and
`quarters`, capped: in steps of at most 1.5 and 1.25. Pages are blocks of 16 tokens, as many as each row fills. Prints
the largest room over the most that pages take at a time, the mean room over the mean of the tokens, and how many
lengths there were, for each of which the programs are compiled.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from realjax.engine.admission import SHORTEST_CACHE, SHORTEST_PROMPTS, bucket_length

NUM_ANSWERS, NUM_SLOTS, PAGE = 512, 128, 16


@dataclass
class Slots:
    """Rows by slot, as (tokens now, tokens at the end), and what the cache came to."""

    rows: dict[int, tuple[int, int]] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=lambda: [0])
    room: list[int] = field(default_factory=list)  # by round, as the two below
    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)

    def admit(self, waiting: list[tuple[int, int]]) -> None:
        free = [slot for slot in range(NUM_SLOTS) if slot not in self.rows]
        if len(free) >= NUM_SLOTS // 4 or not self.rows:
            self.rows |= {slot: waiting.pop(0) for slot in free[: len(waiting)]}

    def decode(self, need: int, grow: Callable[[int], int]) -> None:
        if need > self.lengths[-1]:
            self.lengths.append(grow(need))
        held = [now for now, _ in self.rows.values()]
        self.room.append(NUM_SLOTS * self.lengths[-1])
        self.tokens.append(sum(held))
        self.pages.append(sum(-(-n // PAGE) * PAGE for n in held))
        self.rows = {slot: (now + 1, end) for slot, (now, end) in self.rows.items() if now < end}


def simulate(prompts: np.ndarray, answers: np.ndarray, grow: Callable[[int], int]) -> Slots:
    # The last token of an answer is not put into the cache.
    waiting, slots = [(int(p), int(p + a) - 1) for p, a in zip(prompts, answers)], Slots()
    while waiting or slots.rows:
        slots.admit(waiting)
        slots.decode(1 + max(now for now, _ in [*slots.rows.values(), *waiting]), grow)
    return slots


def make_ways(longest_prompt: int, num_new: int) -> dict[str, Callable[[int], int]]:
    most = bucket_length(longest_prompt, SHORTEST_PROMPTS) + -(-num_new // SHORTEST_CACHE) * SHORTEST_CACHE

    def by_steps(ratio: float) -> Callable[[int], int]:
        def grow(need: int) -> int:
            length = SHORTEST_CACHE
            while length < need:
                length = max(length + 64, int(length * ratio) // 64 * 64)
            return min(length, most)

        return grow

    powers = lambda need: bucket_length(need, SHORTEST_CACHE)
    capped = lambda need: min(powers(need), most)
    return {"powers": powers, "capped": capped, "halves": by_steps(1.5), "quarters": by_steps(1.25)}


def make_cases() -> dict[str, tuple[np.ndarray, np.ndarray, int]]:
    """Returns lengths of prompts and of answers, and max_new_tokens."""
    rng = np.random.default_rng(0)

    def around(median: int, spread: float, most: int) -> np.ndarray:
        return np.clip(np.exp(rng.normal(np.log(median), spread, NUM_ANSWERS)), 1, most).astype(int)

    return {
        "all to 512": (rng.integers(64, 257, NUM_ANSWERS), np.full(NUM_ANSWERS, 512), 512),
        "chat, up to 1,024": (around(128, 0.7, 512), around(256, 0.8, 1024), 1024),
        "sums, up to 512": (around(64, 0.4, 256), around(150, 0.4, 512), 512),
        "reasoning, up to 8,192": (around(150, 0.5, 512), around(2000, 0.9, 8192), 8192),
        "summaries, up to 256": (around(1000, 0.4, 2048), around(60, 0.5, 256), 256),
    }


def main() -> None:
    print(f"{'answers':<24}{'growth':<10}{'peak/pages':>11}{'room/tokens':>12}{'lengths':>9}{'last':>7}")
    for name, (prompts, answers, num_new) in make_cases().items():
        for way, grow in make_ways(int(prompts.max()), num_new).items():
            slots = simulate(prompts, answers, grow)
            peak, mean = max(slots.room) / max(slots.pages), sum(slots.room) / sum(slots.tokens)
            print(f"{name:<24}{way:<10}{peak:11.2f}{mean:12.2f}{len(slots.lengths) - 1:9}{slots.lengths[-1]:7}")


if __name__ == "__main__":
    main()
