"""What the log of a real run looks like to who reads it."""

import io
import re
from collections import Counter

import pytest
from rich.console import Console

from realjax.apps import log
from tests.given.commands import Trial

TIME = re.compile(r"\d\d:\d\d:\d\d |\d{8}-\S+ ")


@pytest.mark.slow
def test_lines_are_short_and_say_each_thing_once_with_its_unit(given, tmp_path, monkeypatch):
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, force_interactive=False, width=120, color_system=None)
    monkeypatch.setattr(log, "make_console", lambda: console)
    options = {"n_gpus_per_node": 2, "allocation_mode": "d1p1m2", "dataset.valid_path": given.held_out}
    trial = Trial(given=given, root=tmp_path, experiment="grpo", options={**options, "eval_freq_steps": 2})
    assert trial.run(max_steps=3, dataset__train_bs_n_seqs=4) == 0
    shown, written = file.getvalue().splitlines(), (trial.folder("logs") / "run.log").read_text().splitlines()
    # Paths stay in one piece.
    assert all(len(line) <= 100 for line in shown if not re.search(r"\S{60}", line))
    assert all(TIME.match(line) or line.startswith("         ") for line in shown)
    text = re.sub(r"\s+", " ", "\n".join(shown))
    assert "d1p1m2 on 0-1" in text and not re.search(r"\bd\d+p\d+t\d", text)
    assert not re.search(r"\(\)|, ?,|: ?,|, ?;|\bNone\b|\bnan\b", text)
    # Numbers of which the name does not say what they count.
    steps = re.findall(r"global step \d\): (.*?, [\d.]+ s)(?:,| )", text)
    assert len(steps) == 3
    for step in steps:
        assert re.search(r"[\d.]+ tokens an answer.*, [\d,]+ tokens/s \(all\), [\d.]+ s$", step)
    assert not re.search(r"\bn_(tokens|seqs)\b|tokens_per_second", text)
    # A record of the file is said once, but for those of steps.
    messages = Counter(line.partition(": ")[2] for line in written if TIME.match(line))
    assert {message for message, count in messages.items() if count > 1} == set()
    # A name that is compiled again says why.
    compiled = [re.search(r"compiled (\w+(?:: \w+)?) .*?in [\d.]+ s(.*) \(program", line) for line in written]
    seen: set[str] = set()
    for name, why in (found.groups() for found in compiled if found):
        assert why.startswith(", again: ") == (name in seen), (name, why)
        seen.add(name)
    assert {"actor_gen: admit", "actor_train"} <= seen
