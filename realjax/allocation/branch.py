"""Branch and bound: the best of all plans, and the knowledge that it is."""

from collections.abc import Callable, Sequence

from realjax.allocation.prices import Options
from realjax.allocation.simulate import OpenPlan, Plan, Priced, Score, Simulator

# fn(plan) -> its score, or what no plan that completes it is better than; raises when enough have been looked at.
ScoreFn = Callable[[Plan], Score]
BoundFn = Callable[[OpenPlan], Score]


class Branches:
    """Decides one call after the other, and leaves a branch as soon as nothing in it can be better than the best."""

    def __init__(self, simulator: Simulator, options: Options, score_fn: ScoreFn, bound_fn: BoundFn) -> None:
        self.options, self.score_fn, self.bound_fn = options, score_fn, bound_fn
        # Homes first, since moves and memory depend on them, and of those what takes most.
        areas = [min(one.seconds * one.mask.bit_count() for one in priced) for priced in options]
        self.order = sorted(range(len(options)), key=lambda i: (simulator.homes[i] != i, -areas[i]))
        self.num_devices, self.least_areas = simulator.cluster.num_devices, areas

    def go_through(self, score: Score) -> None:
        """Gives every plan that may be better than `score`, and than those before it, to `score_fn`."""
        self.best_score = score
        self._visit([None] * len(self.options), 0)

    def _visit(self, plan: list[Priced | None], depth: int) -> None:
        call, is_last = self.order[depth], depth + 1 == len(plan)
        children = list[tuple[Score, int, Priced]]()
        for number, priced in enumerate(self.options[call]):
            plan[call] = priced
            if self._busy_seconds(plan) >= self.best_score.seconds and not self.best_score.excess_bytes:
                continue
            if is_last:
                score = self.score_fn([one for one in plan if one is not None])
                self.best_score = min(self.best_score, score)
            else:
                children.append((self.bound_fn(plan), number, priced))
        for bound, _, priced in sorted(children, key=lambda child: child[:2]):
            if bound < self.best_score:
                plan[call] = priced
                self._visit(plan, depth + 1)
        plan[call] = None

    def _busy_seconds(self, plan: Sequence[Priced | None]) -> float:
        """Returns how long the devices are busy at least, if the work were spread evenly."""
        areas = [
            least if one is None else one.seconds * one.mask.bit_count()
            for one, least in zip(plan, self.least_areas, strict=True)
        ]
        return sum(areas) / self.num_devices
