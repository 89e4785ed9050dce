"""Writes small files of data to begin with: `realjax data example DIR`."""

import json
import random
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

from realjax.apps.demo_data import Review, draw_reviews
from realjax.apps.errors import report_errors
from realjax.apps.words import HELP_FLAGS, say
from realjax.core.json_text import JsonObject

USAGE = """Usage: realjax data example DIR

Writes conversations about films into DIR, as files of the three forms that experiments read:
  sft-*.jsonl      messages, for sft
  pairs-*.jsonl    prompt, chosen and rejected, for rw, dpo, simpo and orpo
  prompts-*.jsonl  prompt, for gen, chat's `sample` and reinforcement learning
each as *-train.jsonl and *-valid.jsonl. The rejected answers blame where the chosen ones praise."""
NUM_TRAIN, NUM_VALID = 2000, 50


def main(words: Sequence[str]) -> int:
    """Runs the command line behind `realjax data example` and returns its exit code."""
    with report_errors("realjax data example") as end:
        if not words or any(word in HELP_FLAGS for word in words):
            say(USAGE)
            end.code = 0 if words else 2
            return end.code
        if len(words) != 1 or words[0].startswith("-"):
            raise ValueError(f"data example: found {' '.join(words)!r}; it needs one directory to write to")
        folder = Path(words[0])
        write_example_files(folder)
        say("\n".join(f"{path}: {num_rows} rows" for path, num_rows in count_rows(folder).items()))
    return end.code


def write_example_files(folder: Path, *, seed: int = 1) -> None:
    """Writes the files; the same seed gives the same bytes. ValueError where the directory cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"data example: {str(folder)!r} cannot be made ({error.strerror}); name another") from error
    rng = random.Random(seed)
    reviews = list(islice(draw_reviews(rng), NUM_TRAIN + NUM_VALID))
    for split, part in (("train", reviews[:NUM_TRAIN]), ("valid", reviews[NUM_TRAIN:])):
        rows: Mapping[str, list[JsonObject]] = {
            "sft": [{"messages": talk(r, rng.choice(r.pos_answers + r.neg_answers))} for r in part],
            "pairs": [
                {
                    "prompt": ask(r),
                    "chosen": talk(r, rng.choice(r.pos_answers))[1:],
                    "rejected": talk(r, rng.choice(r.neg_answers))[1:],
                }
                for r in part
            ],
            "prompts": [{"prompt": ask(r)} for r in part],
        }
        for kind, found in rows.items():
            text = "".join(json.dumps(row) + "\n" for row in found)
            (folder / f"{kind}-{split}.jsonl").write_text(text, encoding="utf-8")


def ask(review: Review) -> list[dict[str, str]]:
    """Returns the user's message about a review."""
    subject = review.prompt[0].lower() + review.prompt[1:]
    return [{"role": "user", "content": f"Review in one sentence: {subject}"}]


def talk(review: Review, answer: str) -> list[dict[str, str]]:
    """Returns the conversation that ends in an answer."""
    return [*ask(review), {"role": "assistant", "content": review.prompt + answer}]


def count_rows(folder: Path) -> dict[Path, int]:
    """Returns the lines of each file that was written."""
    return {path: path.read_text(encoding="utf-8").count("\n") for path in sorted(folder.glob("*.jsonl"))}
