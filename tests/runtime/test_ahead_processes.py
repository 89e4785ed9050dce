"""Two processes with a device each, answers drawn on one and trained on by the other: same order, same result, beside
each other, however long anything takes.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.given.processes import run_workers

WORKER = Path(__file__).with_name("ahead_worker.py")
pytestmark = [pytest.mark.slow, pytest.mark.e2e]


@pytest.fixture(scope="module")
def runs(given, tmp_path_factory) -> list[list[dict[str, Any]]]:
    """What one process printed that has both devices, and what each of two did, whose calls wait for random times."""
    folder = tmp_path_factory.mktemp("ahead")
    texts = [run_workers(WORKER, n, folder, str(given.folder), str(n - 1)) for n in (1, 2)]
    return [[json.loads(text.splitlines()[-1]) for text in group] for group in texts]


def test_random_durations_change_neither_order_nor_result(runs):
    (alone,), (first, second) = runs
    assert first["order"] == second["order"] == alone["order"]
    assert first["layouts"]["actor_gen"] != first["layouts"]["actor_train"]
    for ours, theirs, expected in zip(first["records"], second["records"], alone["records"], strict=True):
        assert ours == theirs
        assert ours.pop("tokens") == expected.pop("tokens")
        assert ours == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert max(record["ages/interrupted_share"] for record in alone["records"]) > 0


def test_generation_and_training_run_beside_each_other(runs):
    """Each made to take as long: for four fifths of that at least, the other runs too."""
    first, second = runs[1]
    trained, drawn = first["trained"][0], second["drawn"][0]
    shared = min(trained[1], drawn[1]) - max(trained[0], drawn[0])
    assert shared >= 0.8 * min(trained[1] - trained[0], drawn[1] - drawn[0]), (trained, drawn)


def test_rows_in_flight_are_saved_by_several_processes(runs):
    assert all(process["saved"] for process in runs[1])
