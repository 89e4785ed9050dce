"""Decides what a run leaves to the planner: its calls' layouts and micro-batches, the roles' remat and zero stages."""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax

from realjax.allocation.choice import (
    PLAN_FILE,
    Choice,
    Choices,
    dump_choices,
    find_machine,
    is_searched,
    load_choices,
)
from realjax.allocation.cluster import Cluster
from realjax.allocation.compare import compare
from realjax.allocation.fit import fit_micro_batches
from realjax.allocation.machine import need_cluster
from realjax.allocation.run_workload import read_workload
from realjax.allocation.workload import Workload
from realjax.core.identity import digest
from realjax.core.processes import is_first, text_from_first
from realjax.dataflow.graph import DataflowGraph, Generate, Host, Inference, MicroBatches, Train
from realjax.dataflow.run import AllocationOptions, CallPlacement, Evaluation, RoleSpec, RolloutEvaluation, RunSpec

logger = logging.getLogger("realjax.allocation")
MOST_PLAN_BYTES = 2**22
MULTIPLES = (1, 8, 64)  # of rows, whose shapes stand for those of all in what a plan is found by


def settle_open(spec: RunSpec, devices: Sequence[jax.Device], memory_bytes: int | None = None) -> RunSpec:
    """Returns a run with all decided that it leaves open: by the planner in mode search, else micro-batches by memory.

    `memory_bytes` of a device stands for what the machine says, see `fit_micro_batches`.
    """
    if spec.allocation.mode == "search":
        return settle(spec, need_cluster(spec.allocation, devices))
    return fit_micro_batches(spec, devices, memory_bytes)


def settle(spec: RunSpec, cluster: Cluster) -> RunSpec:
    """Returns a run in mode search with all decided that it leaves open.

    A run that continues keeps the plan that it has. Every process must call this: they all take the first one's plan.
    Raises ValueError where nothing fits.
    """
    text = dump_choices(decide(spec, cluster)) if is_first() else ""
    return apply_choices(spec, load_choices(text_from_first(text, MOST_PLAN_BYTES)))


def decide(spec: RunSpec, cluster: Cluster) -> Choices:
    """Returns a choice for every call of the graph: an earlier one where it still holds, else the search's."""
    planner = spec.allocation.planner
    if not planner.replan and (kept := find_own_plan(spec)) is not None:
        logger.info("allocation: the plan of this run as it was; planner.replan=True searches anew")
        return kept
    workload = read_workload(spec, cluster.platform)
    path = spec.paths.plans / f"{digest_inputs(workload, cluster, spec.allocation)}.json"
    if spec.allocation.use_cache and path.exists():
        logger.info("allocation: the plan of an earlier search, %s", path)
        return load_choices(path.read_text())
    choices = compare(spec, cluster).searched.choices
    keep_plan(path, choices)
    return choices


def keep_plan(path: Path, choices: Choices) -> None:
    """Writes a plan for later runs; one that cannot be kept is searched again."""
    unfinished = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(dump_choices(choices))
        unfinished.replace(path)
    except OSError as error:
        logger.warning("allocation: the plan is not kept for later runs: %s", error)


def find_own_plan(spec: RunSpec) -> Choices | None:
    """Returns the plan with which a run that continues was started; None where it has none for the machine of now."""
    path = spec.paths.logs / PLAN_FILE
    if spec.recover_mode not in ("auto", "resume") or not path.exists():
        return None
    text = path.read_text()
    if not is_searched(text):
        return None
    before, now = find_machine(text), spec.allocation.machine
    if before not in (None, now):
        logger.info("allocation: the run was planned for %s devices and has %s now: searching anew", before, now)
        return None
    choices = load_choices(text)
    devices = {device for choice in choices.values() for device in choice.devices}
    is_same = choices.keys() == {mfc.name for mfc in spec.graph.mfcs}
    return choices if is_same and max(devices) < spec.allocation.num_devices else None


def digest_inputs(workload: Workload, cluster: Cluster, options: AllocationOptions) -> str:
    """Returns a text that changes with whatever a search goes by."""
    rows = [[call.pack_fn(multiple) for multiple in MULTIPLES] for call in workload.calls]
    return digest(repr((workload.calls, rows, sorted(workload.roles.items()), cluster, options.planner)))


def apply_choices(spec: RunSpec, choices: Choices) -> RunSpec:
    """Returns the run with its calls as they were chosen, in mode manual."""
    calls = tuple(
        call if isinstance(call, Host) else apply_choice(call, choices[call.name]) for call in spec.graph.calls
    )
    placements = {name: CallPlacement(strategy=c.strategy, devices=c.devices) for name, c in choices.items()}
    # Calls of evaluations run where the calls do whose options they have.
    shared = {mfc.placement: placements[mfc.name] for mfc in reversed(spec.graph.mfcs)}

    def adapt(evaluation: Evaluation | RolloutEvaluation) -> Evaluation | RolloutEvaluation:
        trained = spec.graph.train_call(evaluation.role)
        if isinstance(evaluation, RolloutEvaluation) or trained is None:
            return evaluation
        return replace(evaluation, micro_batches=count_micro_batches(trained, choices[trained.name]))

    return replace(
        spec,
        graph=DataflowGraph(calls, spec.graph.dataset_keys),
        roles={name: apply_to_role(spec, role, choices) for name, role in spec.roles.items()},
        evaluations={name: adapt(evaluation) for name, evaluation in spec.evaluations.items()},
        allocation=replace(spec.allocation, mode="manual", calls={**spec.allocation.calls, **shared, **placements}),
    )


def apply_choice(call: Generate | Inference | Train, choice: Choice) -> Generate | Inference | Train:
    """Returns a call in the micro-batches or slots chosen, placed by its own name."""
    if isinstance(call, Generate):
        tail = {"tail_slots": choice.tail_slots or 0, "tail_tp": choice.tail_tp}
        return replace(call, num_slots=choice.num_slots, placed_as=None, **tail)
    return replace(call, micro_batches=count_micro_batches(call, choice), placed_as=None)


def count_micro_batches(call: Inference | Train, choice: Choice) -> MicroBatches:
    """Returns the micro-batches of a call: the user's where they are bounded by tokens, else those chosen."""
    return call.micro_batches if call.micro_batches.max_tokens else MicroBatches(count=choice.num_mbs)


def apply_to_role(spec: RunSpec, role: RoleSpec, choices: Choices) -> RoleSpec:
    """Returns a role with the remat and the zero stage of the call that trains it."""
    if (trained := spec.graph.train_call(role.name)) is None:
        return role
    choice = choices[trained.name]
    return replace(
        role,
        compute=replace(role.compute, remat=choice.remat),
        zero_stage=choice.strategy.zero_stage,
        undecided=frozenset(),
    )
