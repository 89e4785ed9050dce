"""What a run that continues may have changed, what it is told, and what is refused."""

import json
import logging
from dataclasses import asdict, replace

import pytest

from realjax.core.identity import Identity
from realjax.runtime.resume import compare

IDENTITY = Identity(
    fixed={"experiment": "sft", "seed": 1, "dataset.max_seqlen": 32},
    contents={"set of training data": "ab", "model of role default": "cd"},
    steering={"model.optimizer.lr": 0.1, "exp_ctrl.total_train_epochs": 1},
    harmless={"n_gpus_per_node": 8, "stop": ("a",)},
)


def saved(**changes) -> dict:
    """Returns what a save has of an identity: plain JSON."""
    return json.loads(json.dumps(asdict(replace(IDENTITY, **changes))))


def test_the_same_run_is_continued_without_a_word(caplog):
    with caplog.at_level(logging.INFO, "realjax"):
        assert compare(saved(), IDENTITY, "the save") == []
    assert not caplog.records


def test_harmless_changes_are_listed_in_a_line_and_steering_ones_in_another(caplog):
    before = saved(
        harmless={"n_gpus_per_node": 4, "stop": ["b"]}, steering={**IDENTITY.steering, "model.optimizer.lr": 0.2}
    )
    with caplog.at_level(logging.INFO, "realjax"):
        assert compare(before, IDENTITY, "the save") == ["model.optimizer.lr 0.2 -> 0.1"]
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        (
            "INFO",
            'changed since the start, with no effect on the result: n_gpus_per_node 4 -> 8, stop ["b"] -> ["a"]',
        ),
        ("WARNING", "changed since the start, with effect from here on: model.optimizer.lr 0.2 -> 0.1"),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fixed": {**IDENTITY.fixed, "seed": 2}}, r"another seed \(2 there, 1 here\); continue with the same"),
        ({"fixed": {**IDENTITY.fixed, "experiment": "rw"}}, r'another experiment \("rw" there, "sft" here\)'),
        ({"contents": {**IDENTITY.contents, "set of training data": "x"}}, "another set of training data; continue"),
        ({"contents": {**IDENTITY.contents, "model of role default": "x"}}, "another model of role default; continue"),
    ],
)
def test_what_makes_it_another_run_is_refused(change, message):
    with pytest.raises(ValueError, match=rf"^recover: the save was made with {message}"):
        compare(saved(**change), IDENTITY, "the save")


def test_what_only_one_side_knows_is_not_compared():
    before = saved(fixed={"seed": 1, "gone": 3})
    assert compare(before, IDENTITY, "the save") == []
