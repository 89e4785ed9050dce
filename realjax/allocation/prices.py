"""The candidates of a step with their costs, without those that cannot be part of a best plan."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from realjax.allocation.candidates import explain_none, list_meshes, list_splits
from realjax.allocation.choice import Choice
from realjax.allocation.memory import DoesNotFitError
from realjax.allocation.simulate import Priced, Simulator, make_mask
from realjax.allocation.workload import CallWork

Options = Sequence[Sequence[Priced]]  # of each call


def price_all(simulator: Simulator) -> list[list[Priced]]:
    """Returns the candidates of every call that may be part of a best plan.

    Parts of the cluster of one size are alike, so each split is priced on one of them. Raises ValueError for a call
    that cannot be as it was fixed, or that fits nowhere.
    """
    options = []
    for work in simulator.calls:
        role, found = simulator.workload.roles[work.role], list[Priced]()
        by_size: dict[int, list[Priced]] = {}
        meshes = list_meshes(work, simulator.cluster)
        for mesh in meshes:
            if len(mesh) not in by_size:
                splits = list_splits(work, role, simulator.cluster, mesh)
                by_size[len(mesh)] = [simulator.price(work, choice) for choice in splits]
        if not any(by_size.values()):
            raise ValueError(explain_none(work, simulator.cluster))
        kept = keep_fitting(simulator, work, by_size)
        kept = {size: drop_dominated(simulator, work, priced) for size, priced in kept.items()}
        for mesh in meshes:
            found += [_move_to(simulator, priced, mesh) for priced in kept[len(mesh)]]
        options.append(found)
    return options


def price_given(simulator: Simulator, candidates: Mapping[str, Sequence[Choice]]) -> list[list[Priced]]:
    """Returns the given candidates of every call, without those that cannot be part of a best plan."""
    options = []
    for work in simulator.calls:
        by_mesh: dict[tuple[int, ...], list[Priced]] = {}
        for choice in candidates[work.name]:
            by_mesh.setdefault(choice.devices, []).append(simulator.price(work, choice))
        kept = keep_fitting(simulator, work, by_mesh)
        options.append([one for priced in kept.values() for one in drop_dominated(simulator, work, priced)])
    return options


def keep_fitting(simulator: Simulator, work: CallWork, groups: Mapping) -> dict:
    """Returns the groups without what a device cannot hold by itself. Raises DoesNotFitError where nothing is left."""
    least = lambda priced: _least_bytes(simulator, work, priced)
    kept = {key: [one for one in group if least(one) <= simulator.usable_bytes] for key, group in groups.items()}
    if not any(kept.values()):
        smallest = min((one for group in groups.values() for one in group), key=least)
        is_home = simulator.workload.home_call(work.role).name == work.name
        raise DoesNotFitError(simulator.explain_excess(work, smallest.choice, least(smallest), at_home=is_home))
    return kept


def drop_dominated(simulator: Simulator, work: CallWork, group: Iterable[Priced]) -> list[Priced]:
    """Returns what of a call's candidates on one mesh no other is better than, the fastest first.

    One is better if it takes no more time and memory and looks the same to the role's other calls: it has the same
    layout, or there are none.
    """
    has_others = len(simulator.by_role[work.role]) > 1
    by_look: dict[object, list[tuple[tuple[float, ...], Priced]]] = {}
    for priced in group:
        fetched = 0.0 if has_others else simulator.price_fetch(work.role, priced).seconds
        cost = (priced.seconds, priced.seconds + fetched, priced.home_bytes, priced.bytes_at_home, priced.bytes_away)
        by_look.setdefault(priced.layout if has_others else None, []).append((cost, priced))
    kept = list[Priced]()
    for costed in by_look.values():
        front = list[tuple[float, ...]]()
        for cost, priced in sorted(costed, key=lambda one: one[0]):
            if not any(all(a <= b for a, b in zip(better, cost, strict=True)) for better in front):
                front.append(cost)
                kept.append(priced)
    return sorted(kept, key=lambda priced: priced.seconds)


def _least_bytes(simulator: Simulator, work: CallWork, priced: Priced) -> float:
    """Returns the least that a device holds while the call runs, whatever the other calls are."""
    if simulator.workload.roles[work.role].is_trained:
        if simulator.workload.home_call(work.role).name == work.name:
            return priced.home_bytes + priced.bytes_at_home
        return min(priced.bytes_at_home, priced.bytes_away)
    return min(priced.home_bytes + priced.bytes_at_home, priced.bytes_away)


def _move_to(simulator: Simulator, priced: Priced, mesh: tuple[int, ...]) -> Priced:
    if priced.choice.devices == mesh:
        return priced
    choice = replace(priced.choice, devices=mesh)
    return replace(priced, choice=choice, mask=make_mask(mesh), layout=simulator.number_layout(choice))
