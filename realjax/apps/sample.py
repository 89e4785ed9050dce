"""`realjax sample MODEL [MODEL ...] prompts=FILE key=value ...`: checkpoints side by side on the same prompts.

Before and after training, for one. The answers are printed, and written as a page for a browser.
"""

import html
import logging
from collections.abc import Sequence
from pathlib import Path

from realjax.apps.speaker import Speaker
from realjax.apps.talk import read_words, take_devices
from realjax.core.faults import naming
from realjax.core.json_text import JsonObject
from realjax.core.path_names import shorten_paths
from realjax.data.chat import check_messages, read_messages
from realjax.data.jsonl import load_rows
from realjax.options.talk import SampleConfig
from realjax.record.metrics import replace_text
from realjax.record.page import make_page, table_html

logger = logging.getLogger("realjax.sample")


def main(words: list[str]) -> int:
    """Runs the command line and returns its exit code. ValueError for whatever the user can mend."""
    if (command := read_words(words, SampleConfig, "sample")) is None:
        return 0
    models, config = command
    rows = load_rows(config.prompts, {"prompt": (str, list)}, "prompts", check_messages)[: config.num_prompts]
    devices = take_devices(config)
    # One after the other: two need not fit beside each other.
    answers = [
        Speaker(model, config, devices, config.num_slots).answer(list(map(read_messages, rows))) for model in models
    ]
    names = shorten_paths([Path(model) for model in models])
    print(describe(names, rows, answers))
    if config.output is not None:
        path = Path(config.output).expanduser()
        with naming(path):
            replace_text(path, compare_answers(names, rows, answers))
        print(f"written to {path}")
    return 0


def show_prompt(row: JsonObject) -> str:
    """Returns a row's prompt for a person to read: its messages with their roles in front."""
    if isinstance(row["prompt"], str):
        return row["prompt"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in read_messages(row))


def describe(names: Sequence[str], rows: Sequence[JsonObject], answers: Sequence[Sequence[str]]) -> str:
    """Returns the prompts, each with the answers to it, as text."""
    parts = []
    for i, row in enumerate(rows):
        parts.append(f"--- {row['id']}\n{show_prompt(row)}")
        parts += [f"[{name}]\n{of_model[i]}" for name, of_model in zip(names, answers, strict=True)]
    return "\n".join(parts)


def compare_answers(names: Sequence[str], rows: Sequence[JsonObject], answers: Sequence[Sequence[str]]) -> str:
    """Returns the same as a page that needs nothing from outside."""
    title = f"Answers of {', '.join(names)}"
    cells = [(show_prompt(row), *(of_model[i] for of_model in answers)) for i, row in enumerate(rows)]
    body = f"<h1>{html.escape(title)}</h1>{table_html(('prompt', *names), cells)}"
    return make_page(title, body)
