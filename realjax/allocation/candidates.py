"""What a call could be: every split of its model that divides, on every part of the cluster that is worth a look."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from realjax.allocation.choice import Choice
from realjax.allocation.cluster import Cluster
from realjax.allocation.shapes import count_slots
from realjax.allocation.tails import find_tail_fault, list_tail_sizes, round_tail
from realjax.allocation.workload import CallWork, ModelShape, RoleWork
from realjax.core.layout import ParallelStrategy, number_ranges

Devices = tuple[int, ...]

# Nodes are alike: on larger clusters parts of a node, and short runs of nodes, are taken at both ends only.
FEW_NODES = 2
MOST_RUNS = 8
# Cuts from either end of a cluster: this many at most, evenly.
MOST_CUTS = 16
# On larger clusters sequence parallelism and ZeRO are taken wherever they divide: they send as much, and keep less.
FEW_DEVICES = 16
# Open numbers of stages may leave this share of a model's layers empty.
MOST_EMPTY = 1 / 16
# Open numbers of answers decoded at once: all of a step's, a half, a quarter, an eighth.
SLOT_SHARES = (1, 2, 4, 8)
# The last answers, of those decoded at once, that may go on with more tensor parallelism.
TAIL_SHARES = (4, 16)


def list_choices(work: CallWork, role: RoleWork, cluster: Cluster) -> list[Choice]:
    """Returns all candidates of a call, on all sub-meshes; what the user has fixed stays.

    Raises ValueError for a call that cannot be as it was fixed.
    """
    found = [choice for mesh in list_meshes(work, cluster) for choice in list_splits(work, role, cluster, mesh)]
    if not found:
        raise ValueError(explain_none(work, cluster))
    return found


def list_meshes(work: CallWork, cluster: Cluster) -> list[Devices]:
    """Returns the sub-meshes that a call may have: those of the cluster, or what is fixed of them.

    Raises ValueError for a mesh beyond the cluster, or sizes that differ from it.
    """
    if cluster.num_devices < 1:
        raise ValueError(f"cluster {cluster.name}: it has no device; give it at least one node of one device")
    devices, strategy = work.fixed.devices, work.fixed.strategy
    if devices is not None:
        if len(set(devices)) != len(devices) or not all(0 <= device < cluster.num_devices for device in devices):
            raise ValueError(
                f"{work.name}: its devices {number_ranges(devices)} need to be different ones among the cluster's "
                f"{cluster.num_devices}; change device_mesh"
            )
        if strategy is not None and strategy.size != len(devices):
            raise ValueError(
                f"{work.name}: {strategy} needs {strategy.size} devices, but its mesh has {len(devices)}; make the "
                "product of its sizes the number of devices"
            )
        return [devices]
    meshes = list_parts(cluster)
    if strategy is None:
        return meshes
    if strategy.size > cluster.num_devices:
        raise ValueError(
            f"{work.name}: {strategy} needs {strategy.size} devices, but the cluster has {cluster.num_devices}; lower "
            "its sizes, or plan for a larger cluster"
        )
    return [mesh for mesh in meshes if len(mesh) == strategy.size] or [tuple(range(strategy.size))]


def list_parts(cluster: Cluster) -> list[Devices]:
    """Returns the sub-meshes of a cluster: aligned parts of a node of 1, 2, 4, ... devices, and runs of whole nodes.

    Runs are aligned and of 1, 2, 4, ... nodes, or reach from either end of the cluster to any node in between.
    """
    per_node, num_nodes = cluster.devices_per_node, cluster.num_nodes
    nodes = range(num_nodes) if num_nodes <= FEW_NODES else (0, num_nodes - 1)
    spans = [
        (node * per_node + first, size)
        for size in _powers(per_node - 1)
        for node in nodes
        for first in range(0, per_node - size + 1, size)
    ]
    runs = [(first, length) for length in _powers(num_nodes) for first in _choose_firsts(num_nodes, length)]
    step = -(-num_nodes // MOST_CUTS)
    for cut in range(step, num_nodes, step):
        runs += [(0, cut), (cut, num_nodes - cut)]
    spans += [(first * per_node, length * per_node) for first, length in [*runs, (0, num_nodes)]]
    return [tuple(range(first, first + size)) for first, size in dict.fromkeys(spans)]


def list_splits(work: CallWork, role: RoleWork, cluster: Cluster, mesh: Devices) -> list[Choice]:
    """Returns the candidates of a call on one mesh: (pp, tp, dp) that divide the model, and all that is open beside."""
    if work.fixed.strategy is not None:
        sizes = [work.fixed.strategy] if work.fixed.strategy.size == len(mesh) else []
    else:
        sizes = list(_list_sizes(work, cluster, mesh))
    choices = []
    for strategy in sizes:
        if find_fault(work, strategy) is None:
            choices += [replace(choice, devices=mesh) for choice in _list_variants(work, strategy, cluster)]
    return choices


def keeps_fixed(work: CallWork, choice: Choice) -> bool:
    """Returns whether a choice has the sizes and the devices that are fixed of a call."""
    sizes, devices = work.fixed.strategy, work.fixed.devices
    has_sizes = sizes is None or replace(choice.strategy, zero_stage=sizes.zero_stage) == sizes
    return has_sizes and (devices is None or choice.devices == tuple(devices))


def find_fault(work: CallWork, strategy: ParallelStrategy) -> str | None:
    """Returns why a call's model cannot be split so, by the rules of `core.axes`; None where it can."""
    model, tp = work.model, strategy.tp
    for what, size in (("query heads", model.num_q_heads), ("ffn", model.ffn_size), ("vocabulary", model.vocab_size)):
        if size % tp:
            return f"{what} of {size} do not divide over tensor={tp}"
    if model.num_experts % strategy.ep:
        return f"{_count_experts(model)} do not divide over expert={strategy.ep}"
    if strategy.pp > model.num_layers:
        return f"{model.num_layers} layers are fewer than pipeline={strategy.pp} stages"
    if model.cuts is not None and strategy.pp not in model.cuts:
        return f"its layers can be in {list(model.cuts)} pipeline stages, not in {strategy.pp}"
    if strategy.sequence_parallel and work.kind != "generate":
        row_len = work.pack_fn(strategy.row_multiple)[1]
        if row_len % tp:
            return f"rows of {row_len} tokens do not divide over tensor={tp} for sequence parallelism"
    return None


def _count_experts(model: ModelShape) -> str:
    return f"{model.num_experts} experts" if model.num_experts > 1 else "the layers of a model without experts"


def explain_none(work: CallWork, cluster: Cluster) -> str:
    """Returns the message for a call without any candidate."""
    fixed = work.fixed
    if fixed.strategy is not None:
        reason = find_fault(work, fixed.strategy) or _explain_rest(work, fixed.strategy)
        return f"{work.name}: {fixed.strategy} was asked for, but {reason}; change its sizes, or leave them open"
    where = f"devices {number_ranges(fixed.devices)}" if fixed.devices else f"{cluster.num_devices} devices"
    return (
        f"{work.name}: no sizes of data, pipeline and tensor parallelism divide its model on {where}"
        f" with {fixed}; leave more of it open"
    )


def _explain_rest(work: CallWork, strategy: ParallelStrategy) -> str:
    fixed = work.fixed
    if work.kind == "generate" and fixed.tail_slots and (fault := find_tail_fault(strategy)):
        return f"gen.tail_slots={fixed.tail_slots} was too, and it {fault}"
    if work.kind == "generate":
        return f"num_slots={fixed.num_slots} do not divide over data x pipeline = {strategy.row_multiple}"
    if fixed.micro_batches and fixed.micro_batches.max_tokens:
        return f"max_tokens_per_mb={fixed.micro_batches.max_tokens} is less than a row on each of its devices"
    return f"zero_stage={fixed.zero_stage} splits a hidden size of {work.model.hidden_size}, which data does not divide"


def _list_sizes(work: CallWork, cluster: Cluster, mesh: Devices) -> Iterator[ParallelStrategy]:
    """Yields the open sizes on a mesh: tensor parallelism inside a node, no device without a sequence."""
    for tp in _divisors(len(mesh)):
        if tp > cluster.devices_per_node or not _stays_in_node(mesh, tp, cluster.devices_per_node):
            continue
        for pp in _divisors(len(mesh) // tp):
            dp = len(mesh) // (tp * pp)
            if pp * dp <= num_update_sequences(work) and _is_worthwhile(work, pp):
                for ep in _list_expert_sizes(work.model, dp, tp, cluster):
                    yield from _spread_rows(work, ParallelStrategy(dp=dp, pp=pp, tp=tp, ep=ep), cluster)


def _spread_rows(work: CallWork, plain: ParallelStrategy, cluster: Cluster) -> Iterator[ParallelStrategy]:
    """Yields sizes with sequence parallelism and without it, where both are worth a look."""
    spread = replace(plain, sequence_parallel=True)
    can_spread = plain.tp > 1 and work.kind != "generate" and find_fault(work, spread) is None
    if not can_spread or cluster.num_devices <= FEW_DEVICES:
        yield plain
    if can_spread:
        yield spread


def _list_expert_sizes(model: ModelShape, dp: int, tp: int, cluster: Cluster) -> Sequence[int]:
    """Returns in how many parts experts may be cut: all that divide; on larger clusters one, the most in a node, and
    the most of all."""
    if model.num_experts == 1:
        return [1]
    sizes = _divisors(math.gcd(model.num_experts, dp))
    if cluster.num_devices <= FEW_DEVICES:
        return sizes
    within = max(ep for ep in sizes if ep == 1 or ep * tp <= cluster.devices_per_node)
    return sorted({1, within, sizes[-1]})


def _list_variants(work: CallWork, strategy: ParallelStrategy, cluster: Cluster) -> Iterator[Choice]:
    """Yields a split with everything that is open beside it; devices are left to the caller."""
    fixed = work.fixed
    if work.kind == "generate":
        for num_slots in _list_slots(work, strategy):
            plain = Choice(strategy=replace(strategy, zero_stage=0), devices=(), num_slots=num_slots)
            yield from _list_tails(work, plain, cluster)
        return
    is_train = work.kind == "train"
    remats = (False,) if not is_train else (False, True) if fixed.remat is None else (fixed.remat,)
    for zero_stage in _list_zero_stages(work, strategy, cluster) if is_train else (0,):
        for num_mbs in _list_micro_batches(work, strategy):
            for remat in remats:
                layout = replace(strategy, zero_stage=zero_stage)
                yield Choice(strategy=layout, devices=(), num_mbs=num_mbs, remat=remat)


def _list_tails(work: CallWork, choice: Choice, cluster: Cluster) -> Iterator[Choice]:
    """Yields a choice with the ways in which its last answers can go on. Open: as they are, and where lengths differ in
    a quarter and a sixteenth of the slots, with as many devices to a layer as divide the model within a node."""
    wanted, s, answers, model = work.fixed.tail_slots, choice.strategy, work.answers, work.model
    if not wanted:
        yield choice
    if wanted == 0 or find_tail_fault(s) is not None or not answers or (not wanted and answers.mean == answers.longest):
        return
    sizes = list_tail_sizes(s, (model.num_q_heads, model.ffn_size, model.vocab_size))
    near = [tp for tp in sizes if cluster.devices_per_node % tp == 0]
    tp = work.fixed.tail_tp if work.fixed.tail_tp in sizes else max(near, default=None)
    slots = count_slots(work, choice)
    numbers = [wanted] if wanted else [slots // share for share in TAIL_SHARES]
    for number in dict.fromkeys(round_tail(number, s) for number in numbers):
        if tp is not None and number < slots:
            yield replace(choice, tail_slots=number, tail_tp=tp)


def _list_zero_stages(work: CallWork, strategy: ParallelStrategy, cluster: Cluster) -> list[int]:
    # The width of experts is split over dp / ep, which divides it too.
    divides = work.model.hidden_size % strategy.dp == 0
    if work.fixed.zero_stage is not None:
        return [work.fixed.zero_stage] if divides or not work.fixed.zero_stage else []
    if strategy.dp == 1 or not divides:
        return [0]
    return [0, 2, 3] if cluster.num_devices <= FEW_DEVICES else [2, 3]


def _list_micro_batches(work: CallWork, strategy: ParallelStrategy) -> Sequence[int]:
    """Returns the numbers of micro-batches: 1, 2, 4, ... while each has a sequence for every device, or as fixed."""
    fixed = work.fixed.micro_batches
    if fixed is None:
        return _powers(max(1, num_update_sequences(work) // strategy.row_multiple))
    if fixed.max_tokens is None:
        return [fixed.count or 1]
    # As the executor counts them from the rows that it meets, see `runtime.programs.num_micro_batches`.
    num_rows, row_len = work.pack_fn(strategy.row_multiple)
    rows_per_device = math.ceil(num_rows / strategy.dp)
    if fixed.max_tokens < strategy.dp * row_len:
        return []
    least = math.ceil(num_rows * row_len / fixed.max_tokens)
    return [next((n for n in range(least, rows_per_device) if rows_per_device % n == 0), rows_per_device)]


def _list_slots(work: CallWork, strategy: ParallelStrategy) -> list[int]:
    multiple = strategy.row_multiple
    if work.fixed.num_slots is not None:
        return [] if work.fixed.num_slots % multiple else [work.fixed.num_slots]
    return list(dict.fromkeys(-(-work.num_sequences // (share * multiple)) * multiple for share in SLOT_SHARES))


def num_update_sequences(work: CallWork) -> int:
    """Returns the sequences that a program of the call is given at once."""
    return max(1, work.num_sequences * work.passes // work.num_updates)


def _is_worthwhile(work: CallWork, pp: int) -> bool:
    num_layers = work.model.num_layers
    return pp <= num_layers and -num_layers % pp <= MOST_EMPTY * num_layers


def _stays_in_node(mesh: Devices, tp: int, per_node: int) -> bool:
    return all(mesh[i] // per_node == mesh[i + tp - 1] // per_node for i in range(0, len(mesh), tp))


def _choose_firsts(num_nodes: int, length: int) -> Sequence[int]:
    firsts = range(0, num_nodes - length + 1, length)
    return firsts if len(firsts) <= MOST_RUNS else (firsts[0], num_nodes - length)


def _powers(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length())] if most else []


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]
