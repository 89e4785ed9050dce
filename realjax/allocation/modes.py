"""What `allocation_mode` says about calls: how each is split, and on which devices."""

import re
from collections.abc import Iterable

from realjax.allocation.heuristic import has_rules
from realjax.allocation.mesh_names import default_nodes, expand_nodes, parse_device_mesh
from realjax.core.layout import ParallelStrategy
from realjax.dataflow.run import AllocationOptions

SIZES_PATTERN = re.compile(r"(?:[dpme][1-9]\d{0,8}){3,4}")
NAMED_MODES = ("manual", "pipe_model", "pipe_data", "heuristic", "search")


def check_options(options: AllocationOptions) -> None:
    """Raises ValueError for a mode that does not exist or cannot serve these calls, or sizes unlike the machine's.

    What the models decide is checked where calls are laid out.
    """
    if options.mode == "heuristic" and has_rules(options.calls):
        return
    if options.mode == "search":
        for name in options.calls:
            read_mesh(options, name)
        return
    for name, call in options.calls.items():
        if options.mode == "heuristic":
            raise ValueError(
                f"allocation_mode: heuristic has no rules for this experiment; use search, manual with "
                f"{name}.parallel.*, pipe_model, pipe_data, or sizes such as d2p1m4"
            )
        strategy = choose_strategy(options, name, is_train=False)
        if call.device_mesh is None:
            _check_size(options, name, strategy)
        elif options.mode != "manual":
            raise ValueError(
                f"{name}.device_mesh: found '{call.device_mesh}', but allocation_mode={options.mode} uses all devices; "
                "set allocation_mode=manual, or leave it null"
            )
        else:
            choose_devices(options, name, strategy)


def choose_strategy(options: AllocationOptions, name: str, *, is_train: bool) -> ParallelStrategy:
    """Returns how the call whose options are called `name` is split under a mode that is a rule about sizes, or manual.

    Symmetric modes use all devices. As in ReaL they switch sequence parallelism on for training with more than one
    model shard. Raises ValueError for an unknown mode.
    """
    if options.mode == "manual":
        return options.calls[name].strategy
    sizes = {
        "pipe_model": {"d": 1, "p": options.n_nodes, "m": options.n_gpus_per_node},
        "pipe_data": {"d": options.n_gpus_per_node, "p": options.n_nodes, "m": 1},
    }.get(options.mode) or _read_sizes(options.mode)
    dp, pp, tp = (sizes[letter] for letter in "dpm")
    if dp % (ep := sizes.get("e", 1)):
        raise ValueError(
            f"allocation_mode: found {options.mode!r}, whose e{ep} does not divide its d{dp}; the devices that share "
            "experts are among those that share the batch"
        )
    return ParallelStrategy(dp=dp, pp=pp, tp=tp, ep=ep, sequence_parallel=is_train and tp > 1)


def choose_devices(options: AllocationOptions, name: str, strategy: ParallelStrategy) -> tuple[int, ...]:
    """Returns the devices of a call, by number in the run's list: all, or in mode manual those of its mesh.

    Raises ValueError when mesh and strategy differ in size.
    """
    if (planned := options.calls[name].devices) is not None:
        return planned
    mesh = read_mesh(options, name) if options.mode == "manual" else None
    if mesh is None:
        return tuple(range(options.num_devices))
    if len(mesh) != strategy.size:
        raise ValueError(
            f"{name}.device_mesh: '{options.calls[name].device_mesh}' has {len(mesh)} devices, but {name}.parallel "
            f"needs {strategy.size}; make the product of its sizes the number of devices"
        )
    return mesh


def read_mesh(options: AllocationOptions, name: str) -> tuple[int, ...] | None:
    """Returns the devices of a call's `device_mesh`, by number in the run's list; None where it has none.

    Raises ValueError for a mesh that names what is not there.
    """
    if (text := options.calls[name].device_mesh) is None:
        return None
    nodes = expand_nodes(options.nodelist, "nodelist") if options.nodelist else default_nodes(options.n_nodes)
    if len(nodes) != options.n_nodes:
        raise ValueError(
            f"nodelist: '{options.nodelist}' names {len(nodes)} nodes, but n_nodes={options.n_nodes}; make them equal"
        )
    per_node = options.n_gpus_per_node
    return parse_device_mesh(text, nodes=nodes, num_devices_per_node=per_node, subject=f"{name}.device_mesh")


def list_notices(options: AllocationOptions) -> Iterable[str]:
    """Yields a line for every option of the calls that the mode passes over."""
    calls = options.calls
    if options.mode not in ("manual", "search"):
        for name, call in calls.items():
            if call.strategy != ParallelStrategy():
                yield f"{name}.parallel is not used: allocation_mode={options.mode} sets the sizes."
    if options.nodelist is not None and (
        options.mode not in ("manual", "search") or not any(call.device_mesh for call in calls.values())
    ):
        yield "nodelist has no effect: no call has a device_mesh that names nodes."


def _check_size(options: AllocationOptions, name: str, strategy: ParallelStrategy) -> None:
    needed, present = strategy.size, options.num_devices
    if needed != present:
        subject = f"{name}.parallel" if options.mode == "manual" else f"allocation_mode: {options.mode}"
        remedy = f"set n_gpus_per_node={needed} or " if options.n_nodes == 1 else ""
        raise ValueError(
            f"{subject}: data*pipeline*model = {strategy.dp}*{strategy.pp}*{strategy.tp} = {needed} devices, but "
            f"n_nodes*n_gpus_per_node = {present}; {remedy}choose sizes whose product is {present}, or "
            "allocation_mode=null, which follows the number of devices"
        )


def _read_sizes(mode: str) -> dict[str, int]:
    found = re.findall(r"([dpme])(\d+)", mode) if SIZES_PATTERN.fullmatch(mode) else []
    sizes = {letter: int(size) for letter, size in found}
    if len(sizes) != len(found) or not sizes.keys() >= set("dpm"):
        raise ValueError(
            f"allocation_mode: found {mode!r}; it needs {', '.join(NAMED_MODES)}, or the sizes of all three kinds of "
            "parallelism in any order, such as d2p1m4 (data 2, pipeline 1, model 4), with e2 where two of the data "
            "parallel devices share experts"
        )
    return sizes
