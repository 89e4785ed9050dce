"""Conversations in two processes are those of one, and one of them holds them, however long environments take."""

import json
import shutil
from pathlib import Path

import pytest

from tests.given.environments import write_chat_models
from tests.given.processes import run_workers
from tests.runtime.turns_worker import RUNS

WORKER = Path(__file__).with_name("turns_worker.py")
pytestmark = [pytest.mark.slow, pytest.mark.e2e]


def test_two_processes_hold_the_conversations_of_one(given, tmp_path):
    chat, folder = tmp_path / "chat", tmp_path / "given"
    write_chat_models(given, chat)
    shutil.copytree(given.folder, folder, ignore=shutil.ignore_patterns("actor", "ref"))
    shutil.copytree(chat, folder, dirs_exist_ok=True)
    texts = [run_workers(WORKER, n, tmp_path, str(folder)) for n in (1, 2)]
    (alone,), (first, second) = [[json.loads(text.splitlines()[-1]) for text in group] for group in texts]
    for name in RUNS:
        asked = sorted(one[name]["num_asked"] for one in (first, second))
        assert asked[0] == 0 and asked[1] > 0
        for ours, theirs, expected in zip(*(one[name]["records"] for one in (first, second, alone)), strict=True):
            assert ours == theirs
            assert ours.pop("talks") == expected.pop("talks")
            if name.startswith("ahead"):  # by which parameters a token was drawn
                ours, expected = ({k: v for k, v in one.items() if "ages/" not in k} for one in (ours, expected))
            assert ours == pytest.approx(expected, rel=1e-3, abs=1e-4)
            assert ours["conversations/retries"] > 0 and ours["conversations/environment_failed"] == 0
    # Whether a row is under way when the parameters change is a matter of time: of four runs, in one at least.
    ahead = [one[name]["records"] for one in (alone, first) for name in RUNS if name.startswith("ahead")]
    assert max(record["ages/interrupted_share"] for records in ahead for record in records) > 0
