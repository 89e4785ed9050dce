"""The memory model: against what the compiler says of whole calls, and against the arrays that a run really has."""

import dataclasses
import statistics
from pathlib import Path

import jax
import pytest

from realjax.allocation import memory
from realjax.allocation.choice import Choice
from realjax.allocation.memory import MicroBatch, call_memory, find_smallest_change, home_memory, smallest_change
from realjax.allocation.params import count_params, count_trained
from realjax.allocation.workload import Lengths, ModelShape
from realjax.aot.targets import find_target
from realjax.core.axes import inference_rules, tree_shardings
from realjax.core.generation_config import GenerationConfig
from realjax.core.layout import Layout
from realjax.core.lora_config import LoRAConfig
from realjax.core.optimizer_config import OptimizerConfig
from realjax.core.trees import map_paths
from realjax.engine import admission
from realjax.engine.attention import cudnn
from realjax.engine.optim import Optimizer
from realjax.engine.pipeline import num_stage_batches
from realjax.engine.state import abstract_train_state
from realjax.models import heads
from realjax.models.build import build_model
from realjax.models.config import AttentionConfig, LayerKind
from realjax.reshard import apply
from realjax.runtime.memory import device_bytes
from tests.engine.generation_cases import make_programs
from tests.given.models import make_layout, make_model
from tests.given.workloads import make_call, make_role
from tools.bench.memory_model import Case, compile_case, read_cases

# Made by `python -m tools.bench.memory_model tests/allocation/memory_cases.csv --compile`, with the extra `aot`.
COMPILED = [(case, known) for case, known in read_cases(Path(__file__).with_name("memory_cases.csv")) if known]
QUICK = [
    Case(kind="inference", model="13B", head="values", dp=2, tp=4, rows=128, row_len=1024, num_mbs=2),
    Case(kind="train", model="13B", pp=4, tp=2, rows=64, row_len=1024, num_mbs=8),
]
GIB = 2**30
LAYOUTS = [
    {"tp": 8, "sp": True},
    {"dp": 4, "tp": 2, "zero": 2},
    {"dp": 8, "zero": 3},
    {"dp": 2, "pp": 2, "tp": 2, "zero": 1},
    {"pp": 8},
]


def errors() -> list[float]:
    return [case.predict().bytes / compiled.bytes - 1 for case, compiled in COMPILED]


def test_the_model_is_close_to_the_compiler():
    assert len(COMPILED) >= 40
    assert statistics.median(map(abs, errors())) <= 0.07
    assert max(map(abs, errors())) <= 0.15


@pytest.mark.parametrize(("case", "compiled"), COMPILED, ids=str)
def test_the_margin_covers_what_the_model_leaves_out(case, compiled):
    assert case.predict().bytes * (1 + memory.MARGIN) >= compiled.bytes


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("model", "head"), [("7B", "nll"), ("8B", "values"), ("Llama3.2-1B", "nll")])
def test_homes_hold_what_a_run_puts_there(layout, model, head):
    case = Case(kind="train", model=model, head=head, rows=64, row_len=128, **layout)
    built, place = build_model(case.config), Layout.of(case.strategy)
    state = abstract_train_state(built, Optimizer(config=OptimizerConfig(), total_updates=1), place)
    found = home_memory(case.role, case.work, case.choice)
    assert found.bytes == pytest.approx(device_bytes(jax.tree.leaves(state), place.devices[0]), rel=1e-6)
    frozen = dataclasses.replace(case.role, is_trained=False)
    shardings = tree_shardings(built.axes, built.abstract, inference_rules(case.strategy), place)
    params = map_paths(lambda _, x, s: jax.ShapeDtypeStruct(x.shape, "bfloat16", sharding=s), built.abstract, shardings)
    held = device_bytes(jax.tree.leaves(params), place.devices[0])
    assert home_memory(frozen, case.work, case.choice).bytes == pytest.approx(held, rel=1e-6)
    averaged = dataclasses.replace(frozen, is_averaged=True)
    assert home_memory(averaged, case.work, case.choice).bytes == pytest.approx(2 * held, rel=1e-6)
    assert home_memory(dataclasses.replace(frozen, offload=True), case.work, case.choice).bytes == 0


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("is_critic", [False, True])
def test_homes_of_roles_with_adapters_hold_these_and_what_they_lie_beside(layout, is_critic):
    case = Case(kind="train", model="7B", head="values" if is_critic else "nll", rows=64, row_len=128, **layout)
    config = dataclasses.replace(case.config, lora=LoRAConfig(rank=16, alpha=16))
    built, place = build_model(config), Layout.of(case.strategy)
    assert count_trained(config) == built.num_trained_params
    share = count_trained(config) / count_params(case.config)
    role = dataclasses.replace(case.role, trained_share=share)
    found = home_memory(role, case.work, case.choice).terms
    shardings = tree_shardings(built.axes, built.abstract, inference_rules(case.strategy), place)
    params = map_paths(lambda _, x, s: jax.ShapeDtypeStruct(x.shape, "bfloat16", sharding=s), built.abstract, shardings)
    base = device_bytes(jax.tree.leaves(built.take_frozen(params)), place.devices[0])
    assert found["parameters"] == pytest.approx(base, rel=1e-3)
    state = abstract_train_state(built, Optimizer(config=OptimizerConfig(), total_updates=1), place)
    own = device_bytes(jax.tree.leaves(state), place.devices[0])
    # Which of their sides an axis splits is counted as half of them: some tens of MiB beside GiB.
    assert abs(found["masters"] + found["moments"] - own) < 0.05 * base
    assert home_memory(dataclasses.replace(role, is_beside=True, is_trained=False), case.work, case.choice).bytes == 0
    assert call_memory(case.work, role, case.choice, at_home=True).bytes < (
        call_memory(case.work, case.role, case.choice, at_home=True).bytes
    )


@pytest.mark.aot
@pytest.mark.parametrize("case", QUICK, ids=str)
def test_the_compiler_says_today_what_it_said(case):
    assert compile_case(case, find_target("h100")).bytes == pytest.approx(dict(COMPILED)[case].bytes, rel=0.02)


def test_figures_of_the_engine_are_its_own():
    assert heads.CHUNK_BYTES == memory.LOGITS_BYTES
    assert apply.CHUNK_BYTES == memory.MOVED_BYTES
    assert cudnn.ROOM == memory.ROOM
    assert (admission.SHORTEST_PROMPTS, admission.SHORTEST_CACHE) == (memory.SHORTEST_PROMPTS, memory.SHORTEST_CACHE)


@pytest.mark.parametrize("num_rows", [8, 24, 56, 64])
@pytest.mark.parametrize("pp", [2, 4, 8])
def test_stages_get_the_micro_batches_that_the_engine_cuts(num_rows, pp):
    case = Case(kind="train", model="7B", rows=num_rows, row_len=128, pp=pp)
    rows = MicroBatch.of(case.work, case.choice)
    assert rows.num_parts == num_stage_batches(rows.num_rows, Layout.of(case.strategy))


@pytest.mark.parametrize("prompt", [1, 31, 32, 100, 128, 129, 1000])
@pytest.mark.parametrize("num_new", [1, 20, 128, 200, 1024])
def test_a_slot_has_the_room_that_the_engine_gives_it(prompt, num_new):
    config = GenerationConfig(max_new_tokens=num_new)
    bucket = admission.bucket_length(prompt + num_new - 1, admission.SHORTEST_CACHE)
    assert memory.cache_length(prompt, num_new) == min(bucket, admission.most_needed(prompt, config))


@pytest.mark.parametrize("sizes", [{}, {"dp": 2, "tp": 2}, {"pp": 2}], ids=str)
def test_a_cache_is_as_large_as_the_engine_makes_it(sizes):
    """Of layers with windows of 20 and 5, whose rings have 32 and 16 places, and of two without."""
    near, nearer = (LayerKind(name=f"window{n}", mixer=AttentionConfig(window=n)) for n in (20, 5))
    model, layout = make_model(num_layers=8, pattern=(near, LayerKind(), nearer, LayerKind())), make_layout(**sizes)
    config = GenerationConfig(max_new_tokens=40)
    slots = make_programs(model, config, layout, num_slots=8).start(memory.cache_length(30, 40), has_greedy=False)
    role = dataclasses.replace(make_role("actor", ModelShape.of(model.config)), dtype="float32")
    work = make_call("gen", "generate", role, num_sequences=8)
    work = dataclasses.replace(work, prompts=Lengths.all(30), answers=Lengths.all(40))
    choice = Choice(strategy=layout.strategy, devices=tuple(range(layout.strategy.size)), num_slots=8)
    cache = call_memory(work, role, choice, at_home=True).terms["cache"]
    assert cache == device_bytes(jax.tree.leaves(slots.cache), layout.devices[0])
    # 8 slots of 128 tokens, keys and values of two heads of four float32 numbers.
    assert cache == 8 * 2 * 2 * 4 * 4 * 2 * (32 + 128 + 16 + 128) / layout.strategy.size


def test_parameters_that_arrive_need_room_beside_them():
    few = Case(kind="generate", model="70B", tp=8, slots=8, prompt=32, new=32, at_home=False)
    terms = call_memory(few.work, few.role, few.choice, at_home=False).terms
    # As each stack of layers comes it is cut into layers: the two largest are there twice, and a chunk on its way.
    stack = 80 * 8192 * 28672 / 8 * 2
    beside = terms["cache"] + terms["admit_or_decode"] + terms["reallocation"]
    assert beside == pytest.approx(2 * stack + apply.CHUNK_BYTES)
    many = dataclasses.replace(few, slots=256, prompt=1024, new=1024)
    assert "reallocation" not in call_memory(many.work, many.role, many.choice, at_home=False).terms
    assert not {"reallocation", "parameters"} & QUICK[0].predict().terms.keys()


def test_the_smallest_change_saves_what_it_says():
    case = Case(kind="train", model="7B", dp=4, tp=2, rows=256, row_len=1024, remat=False)
    work, role, choice = case.work, case.role, case.choice
    total = lambda choice: home_memory(role, work, choice).bytes + call_memory(work, role, choice, at_home=True).bytes
    texts = []
    for excess in (1, 300 * GIB, 360 * GIB):
        change = find_smallest_change(work, role, choice, at_home=True, excess_bytes=excess)
        assert total(choice) - total(change.choice) == change.saves >= excess
        texts.append(change.text)
        assert change.text in smallest_change(work, role, choice, at_home=True, excess_bytes=excess)
    assert texts[0] == "n_mbs=2"
    assert len(set(texts)) == len(texts)


def test_where_nothing_is_enough_more_devices_are_asked_for():
    case = Case(kind="generate", model="70B", tp=1, slots=1, prompt=32, new=32, at_home=False)
    text = smallest_change(case.work, case.role, case.choice, at_home=False, excess_bytes=80 * GIB)
    assert text == "call: more devices; no option of it saves 80.0 GiB a device"


def test_each_option_that_a_call_has_makes_it_smaller():
    train = Case(kind="train", model="7B", dp=4, tp=2, rows=256, row_len=1024, remat=False)
    for change in ({"remat": True}, {"num_mbs": 4}, {"zero": 3}, {"tp": 4}):
        less = dataclasses.replace(train, **change)
        assert less.predict().bytes < train.predict().bytes, change
    decode = Case(kind="generate", model="7B", dp=4, tp=2, slots=128, prompt=256, new=256, at_home=False)
    assert dataclasses.replace(decode, slots=64).predict().bytes < decode.predict().bytes
