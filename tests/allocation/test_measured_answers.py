"""Answers as long as those of an earlier run."""

import json
from dataclasses import replace

import numpy as np
import pytest

from realjax.allocation.choice import Choice
from realjax.allocation.cluster import find_cluster
from realjax.allocation.cost import call_cost
from realjax.allocation.measured_answers import LAST_STEPS, read_answers
from realjax.allocation.memory import call_memory
from realjax.allocation.run_workload import expect_draws, read_workload
from realjax.allocation.workload import Lengths
from realjax.core.layout import ParallelStrategy
from tests.given.runs import build_rl_spec


def write_record(directory, answers, kind="train"):
    """Writes the record of a run, of a step for each list of lengths, as `answer_metrics` reports them."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "metrics.jsonl").open("a") as file:
        for lens in answers:
            lengths = {"avg": float(np.mean(lens)), "std": float(np.std(lens)), "max": float(np.max(lens))}
            values = {f"{name}_response_len": value for name, value in lengths.items()}
            file.write(json.dumps({"step": 1, "kind": kind, **values}) + "\n")


def test_lengths_are_those_of_the_last_steps(tmp_path):
    rng = np.random.default_rng(0)
    last = [rng.integers(1, 9, 16) for _ in range(LAST_STEPS)]
    write_record(tmp_path, [[900], *last])
    write_record(tmp_path, [[700]], kind="eval")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "ki')  # killed while it wrote
    found, expected = read_answers(tmp_path), Lengths.measure(np.concatenate(last))
    assert found is not None and found.longest == expected.longest
    assert (found.mean, found.mean_square) == pytest.approx((expected.mean, expected.mean_square))


def test_a_run_is_planned_for_the_answers_of_another_with_room_for_longer_ones(given, tmp_path):
    write_record(tmp_path / "earlier", [[2, 3], [3, 4]])
    spec = build_rl_spec(given, tmp_path, planner__answers_from=tmp_path / "earlier")
    plain = build_rl_spec(given, tmp_path)
    short, longest = (read_workload(one, "cpu").calls[0] for one in (spec, plain))
    assert short.answers == Lengths(mean=3, mean_square=9.5, longest=4)
    assert longest.answers == Lengths.all(8) and short.most_new_tokens == 8
    role, choice = read_workload(plain, "cpu").roles["actor"], Choice(devices=(0,), strategy=ParallelStrategy())
    caches = [call_memory(work, role, choice, at_home=True).terms["cache"] for work in (short, longest)]
    assert caches[0] == caches[1] > 0


def test_a_run_that_is_planned_anew_goes_by_its_own_answers(given, tmp_path):
    spec = build_rl_spec(given, tmp_path, planner__replan=True)
    assert read_workload(spec, "cpu").calls[0].answers == Lengths.all(8), "it has none yet"
    write_record(spec.paths.logs, [[2, 2]])
    assert read_workload(spec, "cpu").calls[0].answers == Lengths.all(2)


def test_a_run_without_answers_is_refused(given, tmp_path):
    options = {"planner__answers_from": tmp_path}
    with pytest.raises(ValueError, match=r"planner.answers_from: '.*' has no metrics.jsonl"):
        build_rl_spec(given, tmp_path, **options)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kind": "train", "loss": 2.0}\n')
    with pytest.raises(ValueError, match="has recorded lengths of answers"):
        build_rl_spec(given, tmp_path, **options)
    with pytest.raises(ValueError, match="answer_tokens and answers_from"):
        build_rl_spec(given, tmp_path, planner__answer_tokens=3, **options)


@pytest.mark.parametrize(("share", "draws"), [(1.0, 1.0), (0.5, 1.75), (0.0, 3.0)])
def test_prompts_are_drawn_as_often_as_few_were_of_use(given, tmp_path, share, draws):
    """Half of use: all, then half of them, then a quarter; what learns from them works on as many as ever."""
    (tmp_path / "earlier").mkdir()
    lengths = {f"{name}_response_len": 2.0 for name in ("avg", "std", "max")}
    record = {"step": 1, "kind": "train", "dynamic_sampling/informative_share": share, **lengths}
    (tmp_path / "earlier" / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    options = {"experiment": "grpo", "group_size": 2, "ppo__max_draws": 3, "ppo__drop_uniform_groups": True}
    plain = build_rl_spec(given, tmp_path, **options)
    spec = build_rl_spec(given, tmp_path, planner__answers_from=tmp_path / "earlier", **options)
    assert expect_draws(plain) == 1 and expect_draws(spec) == draws
    calls = {call.name: call for call in read_workload(spec, "cpu").calls}
    assert calls["actor_gen"].draws == calls["rew_inf"].draws == draws and calls["actor_train"].draws == 1
    once = replace(calls["actor_gen"], draws=1.0)
    choice, cluster = Choice(devices=(0,), strategy=ParallelStrategy()), find_cluster("cpu")
    again, first = (call_cost(call, choice, cluster).seconds for call in (calls["actor_gen"], once))
    assert again == pytest.approx(draws * first)
