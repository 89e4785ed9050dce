"""What a search decides becomes the run: its layouts, micro-batches, slots, remat and ZeRO stages."""

import dataclasses

import jax
import pytest

from realjax.allocation import settle as settling
from realjax.allocation.allocate import allocate
from realjax.allocation.choice import PLAN_FILE, Choice, dump_choices, load_choices
from realjax.allocation.cluster import find_cluster
from realjax.allocation.settle import apply_choices, settle
from realjax.core.layout import ParallelStrategy
from tests.given.runs import build_spec, make_options, make_rl_options

CPUS = dataclasses.replace(find_cluster("cpu"), devices_per_node=4)
CHOICES = {
    "actor_gen": Choice(strategy=ParallelStrategy(dp=4), devices=(0, 1, 2, 3), num_slots=8, tail_slots=4, tail_tp=4),
    "rew_inf": Choice(strategy=ParallelStrategy(tp=2), devices=(2, 3)),
    "ref_inf": Choice(strategy=ParallelStrategy(dp=2), devices=(0, 1), num_mbs=2),
    "critic_inf": Choice(strategy=ParallelStrategy(dp=2, zero_stage=3), devices=(2, 3)),
    "actor_train": Choice(strategy=ParallelStrategy(dp=2, zero_stage=1), devices=(0, 1), num_mbs=2, remat=True),
    "critic_train": Choice(strategy=ParallelStrategy(dp=2, zero_stage=3), devices=(2, 3)),
}
OPEN = {"n_gpus_per_node": 4, "allocation_mode": "search"}


def test_the_run_is_as_was_chosen(given, tmp_path):
    spec = build_open(given, tmp_path, eval_freq_epochs=1, dataset__valid_path=given.held_out)
    plan = allocate(apply_choices(spec, CHOICES), jax.devices()[:4])
    assert plan.choices == CHOICES
    assert plan.homes["critic"] == plan.layouts["critic_inf"], "a call in the home layout reads the parameters there"
    assert plan.layouts["greedy_gen"] == plan.layouts["actor_gen"]
    assert plan.idle == ""


def test_what_the_user_fixed_stays(given, tmp_path):
    fixed = {
        "actor_train.parallel.model_parallel_size": 2,
        "actor_train.device_mesh": "NODE01:2,3",
        "actor_train.n_mbs": 2,
        "critic.zero_stage": 0,
        "ppo.gen.num_slots": 4,
    }
    settled = settle(build_open(given, tmp_path, **fixed), CPUS)
    choices = allocate(settled, jax.devices()[:4]).choices
    actor = choices["actor_train"]
    assert (actor.strategy.tp, actor.devices, actor.num_mbs, actor.remat) == (2, (2, 3), 2, False)
    assert choices["critic_train"].strategy.zero_stage == 0 and choices["actor_gen"].num_slots == 4


def test_a_plan_survives_its_file():
    assert load_choices(dump_choices(CHOICES)) == CHOICES


def test_an_earlier_search_is_used_where_nothing_has_changed(given, tmp_path, monkeypatch):
    spec = build_open(given, tmp_path, "sft", allocation_use_cache=True)
    first = settle(spec, CPUS)
    monkeypatch.setattr(settling, "compare", refuse)
    assert settle(spec, CPUS).allocation == first.allocation
    with pytest.raises(AssertionError, match="searched"):
        settle(spec, dataclasses.replace(CPUS, memory_bandwidth=1e9))
    with pytest.raises(AssertionError, match="searched"):
        settle(build_open(given, tmp_path, "sft"), CPUS)


def test_a_run_that_continues_keeps_its_plan(given, tmp_path, monkeypatch):
    spec = build_open(given, tmp_path, recover_mode="auto")
    spec.paths.logs.mkdir(parents=True)
    (spec.paths.logs / PLAN_FILE).write_text(dump_choices(CHOICES))
    monkeypatch.setattr(settling, "compare", refuse)
    assert allocate(settle(spec, CPUS), jax.devices()[:4]).choices == CHOICES
    (spec.paths.logs / PLAN_FILE).write_text(dump_choices(CHOICES, searched=False))
    with pytest.raises(AssertionError, match="searched"):
        settle(spec, CPUS)
    (spec.paths.logs / PLAN_FILE).write_text(dump_choices(CHOICES, machine="1x8"))
    with pytest.raises(AssertionError, match="searched"):
        settle(spec, CPUS)
    (spec.paths.logs / PLAN_FILE).write_text(dump_choices(CHOICES, machine="1x4"))
    assert allocate(settle(spec, CPUS), jax.devices()[:4]).choices == CHOICES
    for changes in ({"planner__replan": True}, {"recover_mode": "disabled"}, {"n_gpus_per_node": 2}):
        with pytest.raises(AssertionError, match="searched"):
            settle(build_open(given, tmp_path, **{"recover_mode": "auto", **changes}), CPUS)


def test_a_model_too_large_is_one_error(given, tmp_path):
    tiny = dataclasses.replace(CPUS, memory_bytes=2**16)
    with pytest.raises(ValueError, match=r"GiB on each, .* more than can be planned with"):
        settle(build_open(given, tmp_path, "sft"), tiny)


def build_open(given, root, experiment="ppo", **changes):
    """Returns a run whose calls are for the search to place."""
    if experiment == "ppo":
        options = make_rl_options(given, root, **OPEN | changes)
    else:
        options = make_options(experiment, given, root, **OPEN | changes)
    return build_spec(experiment, options, is_planned=False)


def refuse(*_, **__):
    raise AssertionError("searched")
