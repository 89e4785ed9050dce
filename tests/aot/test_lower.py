"""Programs lowered from shapes are those that a run compiles."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from realjax.aot.lower import AbstractRun, Program, largest_batch, lower_run
from realjax.dataflow.graph import Train
from realjax.dataflow.run import Evaluation, RunSpec
from realjax.engine.compiled import Compiled
from realjax.runtime.evaluation import evaluate_loss, evaluate_rollouts
from tests.given.runs import GROUPS, LAYOUTS, LONGEST, Given, build_spec, load_executor, make_options, make_plan
from tests.given.texts import write_jsonl

# Of a program by name, what its arguments are: shape, dtype, and the part that each device has.
Seen = set[tuple[str, tuple[tuple[Any, ...], ...]]]
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
CASES = [
    ("sft", "data and tensor"),
    ("dpo", "pipeline"),
    ("ppo", "halves"),
    ("remax", "data and tensor"),
    ("gen", "pipeline"),
    ("gen", "data and tensor"),
]


@contextmanager
def seen_programs() -> Iterator[Seen]:
    """Yields a set that is filled with the programs that are lowered, and those that a run compiles."""
    seen: Seen = set()
    lower, compile_args = Compiled.lower, Compiled._compile

    def note(self: Compiled, args: tuple[object, ...]) -> None:
        seen.add((self.name, tuple(_describe(leaf) for leaf in jax.tree.leaves(args))))

    def note_lower(self: Compiled, *args: object) -> jax.stages.Lowered:
        note(self, args)
        return lower(self, *args)

    def note_compile(self: Compiled, args: tuple[object, ...]) -> jax.stages.Compiled:
        note(self, args)
        return compile_args(self, args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Compiled, "lower", note_lower)
        patch.setattr(Compiled, "_compile", note_compile)
        yield seen


def _describe(leaf: Any) -> tuple[Any, ...]:
    parts = leaf.sharding.devices_indices_map(leaf.shape)
    return leaf.shape, str(leaf.dtype), tuple(sorted((device.id, str(part)) for device, part in parts.items()))


def make_alike(experiment: str, layout: str, given: Given, root: Path) -> RunSpec:
    """Returns a run whose prompts are all cut to the longest, and whose answers are as long as they can be."""
    options: dict[str, Any] = {**LAYOUTS[layout]}
    long = [{"prompt": f"{word} of a long, long film that was good and warm", "answer": " it was"} for word in WORDS]
    data = write_jsonl(root / "long.jsonl", long)
    if experiment in GROUPS:
        options |= {f"{GROUPS[experiment]}.gen.min_new_tokens": LONGEST, f"{GROUPS[experiment]}.gen.top_k": 60}
        options |= {"dataset.path": data, "dataset.valid_path": data, "eval_freq_steps": 1}
    elif experiment == "gen":
        options |= {"dataset.path": data, "gen.min_new_tokens": LONGEST}
    else:
        valid = given.pairs if experiment in ("rw", "dpo") else given.rows
        options |= {"dataset.valid_path": valid, "eval_freq_steps": 1}
    if (experiment, layout) == ("gen", "data and tensor"):
        # Those of the last prompts that do not fill the slots go on with more tensor parallelism.
        options |= {"dataset.train_bs_n_seqs": 8, "gen.num_slots": 6, "gen.tail_slots": 4}
        options |= {"gen.prompt_lookup_num_tokens": 3}
    if layout == "halves":
        options |= {f"{role}.zero_stage": 3 for role in ("actor", "critic")}
    return build_spec(experiment, make_options(experiment, given, root, **options))


def compile_here(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    return lowered.compile()


@pytest.mark.parametrize(("experiment", "layout"), CASES)
def test_a_run_compiles_just_these(experiment, layout, given, tmp_path):
    spec = make_alike(experiment, layout, given, tmp_path)
    with seen_programs() as lowered:
        programs = list(lower_run(spec, make_plan(spec), compile_here))
    executor = load_executor(spec)
    with seen_programs() as compiled:
        executor.step(executor.plan.loader.batch(0), 0)
        for name, evaluation in spec.evaluations.items():
            held_out = executor.plan.held_out[name]
            if isinstance(evaluation, Evaluation):
                evaluate_loss(executor, evaluation, held_out)
            else:
                evaluate_rollouts(executor, evaluation, held_out, None)
    assert lowered == compiled
    assert {program.call for program in programs} >= {mfc.name for mfc in spec.mfcs}


def test_memory_is_what_a_run_counts(given, tmp_path):
    spec = make_alike("ppo", "halves", given, tmp_path)
    executor = load_executor(spec)
    executor.step(executor.plan.loader.batch(0), 0)
    counted = {record.name: record.peak_bytes for record in executor.timeline.of_step(0)}
    found = {}
    for program in lower_run(spec, make_plan(spec), compile_here):
        if program.name in ("train", "inference") and not program.is_evaluation:
            sizes = program.lowered.compile().memory_analysis()
            assert sizes is not None
            outputs = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
            own = sizes.argument_size_in_bytes + outputs + sizes.temp_size_in_bytes
            found[program.call] = own + sum(program.held.values())
    assert found == {call: counted[call] for call in found} and len(found) == 5


def test_a_state_beside_a_call_counts_where_it_lies(given, tmp_path):
    spec = make_alike("ppo", "halves", given, tmp_path)
    plan = make_plan(spec)
    programs = {(p.call, p.name): p for p in lower_run(spec, plan, compile_here) if not p.is_evaluation}
    # The actor's masters and moments are not the trained critic's concern: they lie on other devices.
    assert not programs["critic_train", "train"].held and not programs["actor_train", "train"].held
    held = programs["critic_inf", "inference"].held
    assert set(held) == {"actor: masters", "actor: moments"} or set(held) == {"critic: masters", "critic: moments"}
    moments = next(size for what, size in held.items() if what.endswith("moments"))
    masters = next(size for what, size in held.items() if what.endswith("masters"))
    assert moments == pytest.approx(2 * masters, rel=0.01)
    decode = programs["actor_gen", "decode"]
    assert decode.runs == 1 and decode.turns == LONGEST


def test_the_largest_batch_is_taken(given, tmp_path):
    options = {"dataset.train_path": given.train, "dataset.max_seqlen": 32, "dataset.train_bs_n_seqs": 64}
    spec = build_spec("sft", make_options("sft", given, tmp_path, **LAYOUTS["tensor"], **options))
    plan = make_plan(spec)
    rows = [plan.loader.batch(step).num_rows for step in range(plan.loader.total_steps)]
    assert largest_batch(plan.loader).num_rows == max(rows)
    (program,) = lower_run(spec, plan, compile_here)
    assert program.shape.startswith(f"{max(rows)} rows")


def test_answers_are_the_longest_that_can_be(given, tmp_path):
    """Prompts of all lengths stand for the longest: no step has more rows."""
    changes = {"dataset.path": given.prompts, "dataset.train_bs_n_seqs": 8, "dataset.max_prompt_len": 32}
    spec = build_spec("grpo", make_options("grpo", given, tmp_path, **LAYOUTS["one device"], **changes))
    run = AbstractRun(spec, make_plan(spec), compile_here)
    batch = run.stand_in(spec.graph.order[0], largest_batch(run.plan.loader))
    lengths = np.unique(batch["positions"].max(axis=1) + 1)
    assert lengths.max() == spec.graph.mfcs[0].max_seqlen
    (train,) = [call for call in spec.graph.mfcs if isinstance(call, Train)]
    for call in spec.graph.order[1:]:
        batch = run.stand_in(call, batch)
    program: Program = next(run.lower_call(train, batch))
    assert program.runs == train.num_updates
