"""On what a run goes on: the devices and layouts that its save was made with, and those of now."""

import jax

from realjax.allocation.plan import AllocationPlan
from realjax.core.json_text import JsonObject
from realjax.core.layout import number_ranges

MOST_CALLS = 8  # whose layouts a line shows


def describe_machine(plan: AllocationPlan, num_devices: int) -> JsonObject:
    """Returns what a save says of the devices that it was made on."""
    layouts = {call: f"{choice.strategy} on {number_ranges(choice.devices)}" for call, choice in plan.choices.items()}
    return {"processes": jax.process_count(), "devices": num_devices, "layouts": layouts}


def describe_move(before: JsonObject, now: JsonObject) -> str | None:
    """Returns a line of what differs between two machines, None where nothing does or the first is not known."""
    if not before or before == now:
        return None
    moved = [
        f"{call} {before['layouts'][call]} -> {layout}"
        for call, layout in now["layouts"].items()
        if before["layouts"].get(call, layout) != layout
    ]
    more = [f"and {len(moved) - MOST_CALLS} more calls"] if len(moved) > MOST_CALLS else []
    sizes = [
        f"{before[kind]} -> {now[kind]} {kind}" if before[kind] != now[kind] else f"{now[kind]} {kind}"
        for kind in ("devices", "processes")
    ]
    return (
        f"the run moves: {', '.join([*sizes, *moved[:MOST_CALLS], *more])}; its batches stay, and its results are the "
        "same to rounding"
    )
