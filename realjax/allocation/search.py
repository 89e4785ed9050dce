"""Which plan is best: a step's choices, found among all candidates under the simulator.

Plans to begin with are improved by changing one call at a time, all calls of a role, or two calls on two parts of the
cluster, and by doing so again after a few random changes. Small spaces are gone through whole, by branch and bound, so
that the result is known to be the best. All of it follows from the seed and the number of plans to look at; the wall
time is a limit besides.
"""

import itertools
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from realjax.allocation.branch import Branches
from realjax.allocation.candidates import keeps_fixed
from realjax.allocation.choice import Choice
from realjax.allocation.cluster import Cluster
from realjax.allocation.costing import Costs
from realjax.allocation.heuristic import Placement
from realjax.allocation.memory import DoesNotFitError
from realjax.allocation.prediction import Prediction
from realjax.allocation.prices import Options, price_all, price_given
from realjax.allocation.simulate import OpenPlan, Plan, Priced, Score, Simulator
from realjax.allocation.workload import CallWork, Workload

# Looked at: on two cores a search ends in 10 s for 128 devices, and in 30 s for 1,024.
MOST_PLANS = 50_000
MOST_PLANS_OF_LARGE = 20_000
LARGE = 256  # devices
MOST_SECONDS = 60.0
# Larger spaces are not gone through whole.
LARGEST_SPACE = 10**9
# Of the candidates of a call on a mesh, those that are tried where the call does not run yet: the fastest, and the one
# that holds least.
SHORTLIST = 4
# Plans at most so many times as slow as the best are worth changes of several calls.
NEAR = 1.05


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The best plan found. Predicted, never measured."""

    choices: Mapping[str, Choice]
    prediction: Prediction
    num_plans: int  # looked at, partial ones counted
    is_optimal: bool  # no plan of these candidates is faster
    was_cut: bool  # the wall time ended it: on another day another plan may be found


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long a search goes on. Without the wall time its result is always the same."""

    seed: int = 0
    most_plans: int | None = None  # None: by the size of the cluster
    most_seconds: float = MOST_SECONDS


def search(
    workload: Workload,
    cluster: Cluster,
    costs: Costs,
    limits: Limits = Limits(),  # noqa: B008
    *,
    candidates: Mapping[str, Sequence[Choice]] | None = None,
    starts: Sequence[Mapping[str, Choice]] = (),
) -> SearchResult:
    """Returns the best plan that fits among `candidates`, by default all there are.

    It is no worse than any of `starts`, plans of other origin, that keep to what is fixed. Raises ValueError for calls
    that cannot be as they were fixed, and where no plan fits, with the call that lacks most.
    """
    start = time.monotonic()
    simulator = Simulator(workload, costs, cluster)
    options = price_all(simulator) if candidates is None else price_given(simulator, candidates)
    allowed = [plan for plan in starts if all(keeps_fixed(call, plan[call.name]) for call in workload.calls)]
    given = [[simulator.price(call, plan[call.name]) for call in workload.calls] for plan in allowed]
    return Search(simulator, options, limits, start).run(given)


def place_choices(
    workload: Workload,
    cluster: Cluster,
    costs: Costs,
    placements: Mapping[str, Placement],
    limits: Limits = Limits(),  # noqa: B008
) -> SearchResult:
    """Returns the best plan in which each call has the strategy and devices of its placement: a plan by rule, with the
    micro-batches, ZeRO stage, remat and slots that suit it. Raises ValueError as `search` does.
    """

    def fix(call: CallWork) -> CallWork:
        placed = placements[call.name]
        return replace(call, fixed=replace(call.fixed, strategy=placed.strategy, devices=placed.devices))

    return search(replace(workload, calls=tuple(map(fix, workload.calls))), cluster, costs, limits)


def list_single_layouts(
    workload: Workload,
    cluster: Cluster,
    costs: Costs,
    limits: Limits = Limits(),  # noqa: B008
) -> list[SearchResult]:
    """Returns the best plan for each (pp, tp, dp) that all calls can have on all devices, the fastest first.

    Devices and sizes that are fixed do not count. Raises ValueError where none fits.
    """
    start = time.monotonic()
    every = tuple(range(cluster.num_devices))

    def free(call: CallWork) -> CallWork:
        return replace(call, fixed=replace(call.fixed, strategy=None, devices=every))

    workload = replace(workload, calls=tuple(map(free, workload.calls)))
    simulator = Simulator(workload, costs, cluster)
    groups = [group_by_sizes(priced) for priced in price_all(simulator)]
    shared = [sizes for sizes in groups[0] if all(sizes in group for group in groups)]
    if not shared:
        raise ValueError(f"no single layout of {len(every)} devices divides and fits all calls; split them by call")
    found, errors = list[SearchResult](), list[ValueError]()
    for sizes in shared:
        own = replace(limits, most_plans=(limits.most_plans or MOST_PLANS) // len(shared) + 1)
        try:
            found.append(Search(simulator, [group[sizes] for group in groups], own, start).run())
        except ValueError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    return sorted(found, key=lambda result: result.prediction.seconds)


def group_by_sizes(priced: Sequence[Priced]) -> dict[tuple[int, int, int], list[Priced]]:
    """Returns options by their (pp, tp, dp)."""
    groups: dict[tuple[int, int, int], list[Priced]] = {}
    for one in priced:
        split = one.choice.strategy
        groups.setdefault((split.pp, split.tp, split.dp), []).append(one)
    return groups


class OutOfBudget(Exception):
    """Enough plans have been looked at, or enough time has passed."""


class Search:
    """One search among the options of each call."""

    def __init__(self, simulator: Simulator, options: Options, limits: Limits, start: float) -> None:
        self.simulator, self.options = simulator, options
        self.rng, self.deadline = random.Random(limits.seed), start + limits.most_seconds
        by_size = MOST_PLANS if simulator.cluster.num_devices <= LARGE else MOST_PLANS_OF_LARGE
        self.num_plans, self.most_plans, self.was_cut = 0, limits.most_plans or by_size, False
        self.least_seconds = [min(one.seconds for one in priced) for priced in options]
        self.by_mask = [_group_by_mask(priced) for priced in options]
        self.short = [{mask: _shorten(group) for mask, group in groups.items()} for groups in self.by_mask]
        self.best: Plan = []
        self.best_score = Score(math.inf, math.inf)

    def run(self, given: Sequence[Plan] = ()) -> SearchResult:
        """Returns the best plan. Raises ValueError where none fits."""
        is_optimal = False
        try:
            # Known first, so that a run which can fit is never refused for want of time.
            self.score([min(priced, key=_lean_bytes) for priced in self.options])
            for plan in [*given, *self.list_starts()]:
                self.improve(plan)
            is_optimal = self.prove()
            while not is_optimal:
                self.improve(self.kick(self.best))
        except OutOfBudget:
            pass
        if self.best_score.excess_bytes:
            raise DoesNotFitError(self.simulator.explain_misfit(self.best))
        names = [call.name for call in self.simulator.calls]
        return SearchResult(
            choices={name: priced.choice for name, priced in zip(names, self.best, strict=True)},
            prediction=self.simulator.predict(self.best),
            num_plans=self.num_plans,
            is_optimal=is_optimal,
            was_cut=self.was_cut,
        )

    def prove(self) -> bool:
        """Goes through all plans, where they are few; returns whether the best is known to be the best of all.

        Half of the plans that are left to look at have to do.
        """
        if math.prod(map(len, self.options)) > LARGEST_SPACE:
            return False
        most_plans, self.most_plans = self.most_plans, (self.num_plans + self.most_plans) // 2
        try:
            Branches(self.simulator, self.options, self.score, self.bound).go_through(self.best_score)
        except OutOfBudget:
            if self.was_cut:
                raise
            return False
        finally:
            self.most_plans = most_plans
        return True

    def score(self, plan: Plan, limit: Score | None = None) -> Score:
        """Returns a plan's score, see `Simulator.score`, and remembers it if it is the best. Raises OutOfBudget."""
        score = self.simulator.score(plan, limit)
        if score < self.best_score:
            self.best, self.best_score = list(plan), score
        self.count()
        return score

    def bound(self, plan: OpenPlan) -> Score:
        """Returns what no plan that completes this one is better than. Raises OutOfBudget."""
        self.count()
        return self.simulator.bound(plan, self.least_seconds)

    def count(self) -> None:
        """Counts a plan. Raises OutOfBudget when it was the last."""
        self.num_plans += 1
        self.was_cut = time.monotonic() > self.deadline
        if self.was_cut or self.num_plans >= self.most_plans:
            raise OutOfBudget

    def list_starts(self) -> Iterator[Plan]:
        """Yields plans to begin with: the fastest of each call by itself, single layouts, and roles on two parts."""
        yield [priced[0] for priced in self.options]
        masks = set.intersection(*(set(groups) for groups in self.by_mask))
        for mask in sorted(masks, key=lambda mask: (-mask.bit_count(), mask))[:1]:
            groups = [group_by_sizes(groups[mask]) for groups in self.by_mask]
            shared = [sizes for sizes in groups[0] if all(sizes in group for group in groups)]
            single = [[group[sizes][0] for group in groups] for sizes in shared]
            yield from sorted(single, key=lambda plan: sum(one.seconds for one in plan))[:2]
        trained = [role.name for role in self.simulator.workload.roles.values() if role.is_trained]
        for first, second in self.list_halves():
            # Trained roles in turn on the two parts, the others wherever they are fastest.
            parts = {role: (first, second)[i % 2] for i, role in enumerate(trained)}
            yield [
                groups.get(parts.get(call.role, -1), priced)[0]
                for call, groups, priced in zip(self.simulator.calls, self.by_mask, self.options, strict=True)
            ]

    def list_halves(self) -> list[tuple[int, int]]:
        """Returns the pairs of meshes that are most of the cluster and share no device, the most equal first."""
        masks = sorted(set().union(*self.by_mask), key=lambda mask: (-mask.bit_count(), mask))[:64]
        every = (1 << self.simulator.cluster.num_devices) - 1
        pairs = [(a, every & ~a) for a in masks if every & ~a in masks]
        return sorted(pairs, key=lambda pair: (abs(pair[0].bit_count() - pair[1].bit_count()), pair))

    def improve(self, plan: Plan) -> None:
        """Changes a plan until no change of one call helps, nor, where it is near the best, of several."""
        plan, score = self.change_calls(list(plan), self.score(plan))
        while score <= (self.best_score.excess_bytes, NEAR * self.best_score.seconds):
            better, better_score = self.change_together(plan, score)
            if better_score >= score:
                return
            plan, score = self.change_calls(better, better_score)

    def change_calls(self, plan: list[Priced], score: Score) -> tuple[list[Priced], Score]:
        """Returns a plan that no change of a single call makes better."""
        order, unchanged = list(range(len(plan))), 0
        self.rng.shuffle(order)
        for call in itertools.cycle(order):
            if unchanged == len(order):
                break
            before = score
            for priced in self.list_neighbors(plan, call):
                if priced.seconds < score.seconds or score.excess_bytes:
                    changed = [*plan[:call], priced, *plan[call + 1 :]]
                    if (found := self.score(changed, score)) < score:
                        plan, score = changed, found
            unchanged = unchanged + 1 if score == before else 0
        return plan, score

    def list_neighbors(self, plan: Plan, call: int) -> list[Priced]:
        """Returns what a call is tried with: all options on the meshes of its role, and a few on every other."""
        near = {plan[i].mask for i in self.simulator.by_role[self.simulator.calls[call].role]}
        return [
            priced
            for mask, group in self.by_mask[call].items()
            for priced in (group if mask in near else self.short[call][mask])
        ]

    def change_together(self, plan: list[Priced], score: Score) -> tuple[list[Priced], Score]:
        """Returns the best of a plan and those with one role on another mesh, or with two calls on two parts."""
        best, best_score = plan, score
        for changed in itertools.chain(self.list_role_changes(plan), self.list_pair_changes(plan)):
            if (found := self.score(changed, best_score)) < best_score:
                best, best_score = changed, found
        return best, best_score

    def list_role_changes(self, plan: Plan) -> Iterator[list[Priced]]:
        """Yields the plan with all calls of a role on one mesh, in the layout of its home call and in their own."""
        for numbers in self.simulator.by_role.values():
            if len(numbers) == 1:
                continue
            home = self.simulator.homes[numbers[0]]
            for mask, group in self.short[home].items():
                if not all(mask in self.by_mask[i] for i in numbers):
                    continue
                for priced in group:
                    alike, own = list(plan), list(plan)
                    for i in numbers:
                        others = self.by_mask[i][mask]
                        own[i] = others[0]
                        alike[i] = next((one for one in others if one.layout == priced.layout), others[0])
                    alike[home] = own[home] = priced
                    yield alike
                    yield own

    def list_pair_changes(self, plan: Plan) -> Iterator[list[Priced]]:
        """Yields the plan with two calls side by side on two parts of the cluster."""
        for first, second in self.list_halves():
            for a, b in itertools.combinations(range(len(plan)), 2):
                for one in self.by_mask[a].get(first, ())[:2]:
                    for other in self.by_mask[b].get(second, ())[:2]:
                        changed = list(plan)
                        changed[a], changed[b] = one, other
                        yield changed

    def kick(self, plan: Plan) -> list[Priced]:
        """Returns a plan with some calls changed at random."""
        kicked = list(plan)
        for call in self.rng.sample(range(len(plan)), self.rng.randint(1, len(plan))):
            kicked[call] = self.rng.choice(self.short[call][self.rng.choice(list(self.short[call]))])
        return kicked


def _group_by_mask(priced: Sequence[Priced]) -> dict[int, list[Priced]]:
    groups: dict[int, list[Priced]] = {}
    for one in priced:
        groups.setdefault(one.mask, []).append(one)
    return groups


def _lean_bytes(one: Priced) -> tuple[float, float]:
    return one.home_bytes + one.bytes_away, one.seconds


def _shorten(group: Sequence[Priced]) -> list[Priced]:
    leanest = min(group, key=_lean_bytes)
    return list(dict.fromkeys([*group[: SHORTLIST - 1], leanest]))
