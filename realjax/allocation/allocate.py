"""The one entry: from a run that knows no device to the plan of where its calls run."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from realjax.allocation import heuristic, modes, shapes
from realjax.allocation.balance import find_cut, has_open_cut
from realjax.allocation.choice import Choice
from realjax.allocation.machine import find_machine
from realjax.allocation.plan import AllocationPlan, RolloutShape
from realjax.allocation.predict import predict_run
from realjax.core.layout import Layout, ParallelStrategy, name_devices
from realjax.core.processes import array_from_first
from realjax.dataflow.graph import Generate, Train
from realjax.dataflow.run import RoleSpec, RunSpec
from realjax.models.config import find_lookup_fault


def allocate(spec: RunSpec, devices: Sequence[jax.Device]) -> AllocationPlan:
    """Returns the plan of a run on `devices`, of which there are as many as its options say; nothing is allocated.

    Raises ValueError for layouts that do not fit the options, the models or the batches.
    """
    plan = make_plan(spec, lay_out(spec, devices), devices)
    return replace(plan, predicted=predict_run(spec, plan.choices, devices))


def make_plan(spec: RunSpec, layouts: Mapping[str, Layout], devices: Sequence[jax.Device]) -> AllocationPlan:
    """Returns the plan that follows from the calls' layouts."""
    rollouts = shapes.shape_rollouts(spec, layouts)
    loader, held_out = shapes.shape_batches(spec, layouts, rollouts)
    homes = {role: find_home(spec, role, layouts) for role in spec.graph.roles}
    used = {device for layout in layouts.values() for device in layout.devices}
    return AllocationPlan(
        layouts=layouts,
        roles={mfc.name: mfc.role for mfc in spec.mfcs},
        homes=homes,
        offloaded=frozenset(role for role in spec.graph.roles if is_offloaded(spec, role, layouts)),
        empty_layers={role: count_empty_layers(spec, role, layouts) for role in spec.graph.roles},
        row_multiples={mfc.name: shapes.row_multiple(mfc, layouts[mfc.name]) for mfc in spec.mfcs},
        rollouts=rollouts,
        loader=loader,
        held_out=held_out,
        is_searched=any(call.devices is not None for call in spec.allocation.calls.values()),
        choices=read_choices(spec, layouts, rollouts, devices),
        idle=name_devices([device for device in devices if device not in used]),
    )


def read_choices(
    spec: RunSpec,
    layouts: Mapping[str, Layout],
    rollouts: Mapping[str, RolloutShape],
    devices: Sequence[jax.Device],
) -> dict[str, Choice]:
    """Returns how each call of the graph runs, in the planner's words."""
    numbers = {device: number for number, device in enumerate(devices)}
    return {
        mfc.name: Choice(
            strategy=layouts[mfc.name].strategy,
            devices=tuple(numbers[device] for device in layouts[mfc.name].devices),
            num_mbs=shapes.count_micro_batches(mfc),
            remat=isinstance(mfc, Train) and spec.roles[mfc.role].compute.remat,
            **describe_slots(rollouts[mfc.name] if isinstance(mfc, Generate) else None),
        )
        for mfc in spec.graph.mfcs
    }


def describe_slots(shape: RolloutShape | None) -> dict[str, Any]:
    """Returns the slots of a generate call as a choice has them; of any other call nothing."""
    if shape is None:
        return {}
    tail = shape.tail
    of_tail = {"tail_slots": tail.num_slots, "tail_tp": tail.layout.strategy.tp} if tail else {}
    return {"num_slots": shape.num_slots, **of_tail}


def lay_out(spec: RunSpec, devices: Sequence[jax.Device]) -> dict[str, Layout]:
    """Returns the layout of every call, by name, as the mode says."""
    cut = None
    if has_open_cut(spec):
        machine = find_machine(spec.allocation, devices)
        # Hosts may differ, and all take the first one's.
        cut = int(array_from_first(np.array(find_cut(spec, machine.cluster) if machine else 0))) or None
    return {
        name: Layout(placement.strategy, tuple(devices[i] for i in placement.devices))
        for name, placement in place_calls(spec, cut).items()
    }


def place_calls(spec: RunSpec, cut: int | None = None) -> dict[str, heuristic.Placement]:
    """Returns where every call runs, by name, as the mode says; devices by number. `cut` is `heuristic.place_run`'s."""
    options, trained = spec.allocation, {mfc.placement for mfc in spec.mfcs if isinstance(mfc, Train)}
    rules: Mapping[str, heuristic.Placement] = {}
    if options.mode == "heuristic":
        rules = heuristic.place_run(spec, cut)
    placements = {}
    for mfc in spec.mfcs:
        name, is_train = mfc.placement, mfc.placement in trained
        if rules:
            strategy, numbers = rules[name].strategy, rules[name].devices
        else:
            strategy = modes.choose_strategy(options, name, is_train=is_train)
            numbers = modes.choose_devices(options, name, strategy)
        check_experts(name, strategy, spec.roles[mfc.role])
        if isinstance(mfc, Generate) and mfc.records_routes and strategy.pp > 1:
            raise ValueError(
                f"{name}: routing_replay records the experts of tokens on one pipeline stage, and it has "
                f"{strategy.pp}; set {name}'s pipeline_parallel_size to 1"
            )
        if isinstance(mfc, Generate):
            check_lookup(name, mfc, strategy, spec.roles[mfc.role])
        if options.calls[name].devices is None:  # a planner has said that too
            strategy = replace(strategy, zero_stage=spec.roles[mfc.role].zero_stage if is_train else 0)
        placements[mfc.name] = heuristic.Placement(strategy=strategy, devices=tuple(numbers))
    return placements


def check_experts(call: str, strategy: ParallelStrategy, role: RoleSpec) -> None:
    """Raises ValueError where devices are to share experts that a role's model has not, or not as many."""
    num_experts = role.config.experts.num_experts if role.config.experts else 1
    if num_experts % strategy.ep:
        found = f"{num_experts} experts, which do not divide over them" if num_experts > 1 else "no experts"
        raise ValueError(
            f"{call}: {strategy.ep} devices are to share the experts of a layer, but {role.name}'s model has {found}; "
            f"use an expert_parallel_size of {'1' if num_experts == 1 else 'a divisor of that'}"
        )


def check_lookup(call: str, mfc: Generate, strategy: ParallelStrategy, role: RoleSpec) -> None:
    """Raises ValueError where tokens are to be proposed that a layout or a role's model cannot take in."""
    num_tokens = mfc.config.prompt_lookup_num_tokens
    if num_tokens and (fault := find_lookup_fault(role.config, num_tokens, strategy.pp)):
        raise ValueError(f"{call}: {fault}")


def find_home(spec: RunSpec, role: str, layouts: Mapping[str, Layout]) -> Layout:
    """Returns where a role lives: where it is trained, else where its first call runs."""
    first = next(mfc for mfc in spec.graph.mfcs if mfc.role == role)
    return layouts[(spec.graph.train_call(role) or first).name]


def is_offloaded(spec: RunSpec, role: str, layouts: Mapping[str, Layout]) -> bool:
    """Returns whether a role's parameters are in host memory between its calls: where it is never trained and shares a
    device with a call of another role, if its options do not decide otherwise.

    Raises ValueError for a trained role that is to be offloaded.
    """
    wanted, is_trained = spec.roles[role].offload, spec.graph.train_call(role) is not None
    if spec.roles[role].base is not None and not is_trained:
        if wanted:
            raise ValueError(
                f"{role}.offload: its parameters are those that adapters of another role lie beside, which stay where "
                "that is trained; set it to False or null"
            )
        return False
    if is_trained and wanted:
        raise ValueError(
            f"{role}.offload: a role that is trained stays on its devices, where its masters and moments are "
            "updated; set it to False or null"
        )
    if wanted is not None or is_trained:
        return bool(wanted)
    own, others = (
        {d for mfc in spec.graph.mfcs if (mfc.role == role) is mine for d in layouts[mfc.name].devices}
        for mine in (True, False)
    )
    return bool(own & others)


def count_empty_layers(spec: RunSpec, role: str, layouts: Mapping[str, Layout]) -> int:
    """Returns how many empty layers make a role's pipeline stages equal in the layouts of all its calls.

    It has one number for all of them: its parameters go from layout to layout as they are, and into those of a role
    that follows it, or has a base in common with it. Raises ValueError for more stages than layers, or layers of
    several kinds that they cut unequally.
    """
    pairs = [{average.role, average.source} for average in spec.averages]
    base = spec.roles[role].base
    pairs.append({name for name, one in spec.roles.items() if base is not None and one.base == base} | {role})
    alike = {role}.union(*(pair for pair in pairs if role in pair))
    config = spec.roles[role].config
    stages = {mfc.placement: layouts[mfc.name].strategy.pp for mfc in spec.mfcs if mfc.role in alike}
    for call, pp in stages.items():
        if pp > config.num_layers:
            raise ValueError(
                f"{call}: {pp} pipeline stages, but {role}'s model has {config.num_layers} layers; use a "
                f"pipeline_parallel_size of at most {config.num_layers}"
            )
        try:
            config.count_empty_layers(pp)
        except ValueError as error:
            raise ValueError(f"{call}, {role}'s model: {error}") from None
    return config.count_empty_layers(math.lcm(*stages.values()))
