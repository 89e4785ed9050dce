"""Dynamic sampling (arXiv:2503.14476 section 3.2): prompts are drawn until enough have answers that differ in reward.

Each draw takes as many prompts of the stream as are still wanted, so none of the groups that are of use is left over.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import networkx as nx
import numpy as np

from realjax.core.batch import Batch
from realjax.core.metrics import Last, Mean, Metric, Total
from realjax.core.processes import array_from_first
from realjax.data.loader import Loader
from realjax.data.packing import pack, unpack
from realjax.dataflow.graph import DataflowGraph, Generate
from realjax.dataflow.run import DynamicSampling
from realjax.runtime.rollouts import plan_rollout

if TYPE_CHECKING:
    from realjax.runtime.executor import Executor

logger = logging.getLogger("realjax.draws")
# Where the sampler's state is among those of host calls, which go into saves: prompts taken of the stream, and draws.
SAMPLING = "dynamic_sampling"
FIRST: Mapping[str, float] = {"prompts": 0.0, "draws": 0.0}

Sequences = list[dict[str, np.ndarray]]


@dataclass
class Drawn:
    """What the draws of a step have brought so far."""

    groups: list[Sequences] = field(default_factory=list)  # whose answers differ in reward
    others: list[Sequences] = field(default_factory=list)  # of the last draw
    num_draws: int = 0
    num_prompts: int = 0
    num_tokens: int = 0  # of answers
    rewards: list[float] = field(default_factory=list)

    def add(self, batch: Batch) -> None:
        """Takes in the answered prompts of a draw, in the order in which they were drawn."""
        by_group: dict[int, Sequences] = {}
        for sequence in unpack(batch):
            by_group.setdefault(int(sequence["group"]), []).append(sequence)
        groups = [sorted(by_group[number], key=lambda one: int(one["sample_id"])) for number in sorted(by_group)]
        scored = [[float(one["rewards"]) for one in group if not one.get("is_failed", False)] for group in groups]
        differ = [len(set(rewards)) > 1 for rewards in scored]
        self.others = []
        # Rewards may come from a user's function, which need not give the same in every process.
        for group, is_informative in zip(groups, array_from_first(np.array(differ)), strict=True):
            (self.groups if is_informative else self.others).append(group)
        self.num_draws += 1
        self.num_prompts += len(groups)
        self.num_tokens += int(np.sum(batch["loss_mask"]))
        self.rewards += [reward for rewards in scored for reward in rewards]

    def metrics(self, num_wanted: int) -> dict[str, Metric]:
        """Returns what was drawn, whether it is learned from or not."""
        num_groups = float(len(self.groups))
        return {
            "draws": Total(float(self.num_draws)),
            "drawn_prompts": Total(float(self.num_prompts)),
            "drawn_tokens": Total(float(self.num_tokens)),
            "drawn_reward": Mean(sum(self.rewards), float(len(self.rewards))),
            "informative_share": Mean(num_groups, float(self.num_prompts)),
            "batch_filled": Mean(num_groups, float(num_wanted)),
        }


class GroupSampler:
    """Draws prompts, has them answered and judged, and keeps those whose answers differ in reward."""

    def __init__(self, sampling: DynamicSampling, graph: DataflowGraph, loader: Loader) -> None:
        self.sampling, self.loader = sampling, loader
        judge = graph.producers["rewards"]
        names = {*nx.ancestors(graph.edges, judge), judge}
        self.calls = [call for call in graph.order if call.name in names]
        self.names = frozenset(names)
        (self.generate,) = [call.name for call in self.calls if isinstance(call, Generate)]

    def draw(self, executor: "Executor", step: int) -> tuple[Batch, dict[str, Sequence[Mapping[str, Metric]]]]:
        """Returns a step's answers, judged, and the metrics of the calls that made them.

        Raises RuntimeError where no group is of use, and the run is to stop then.
        """
        drawn, wanted, state = Drawn(), self.loader.batch_size, executor.controls[SAMPLING]
        metrics: dict[str, list[Mapping[str, Metric]]] = {}
        while drawn.num_draws < self.sampling.max_draws and len(drawn.groups) < wanted:
            count = wanted - len(drawn.groups)
            batch = self.loader.take(int(state["prompts"]), count)
            # Numbered by the draw: no other one has its randomness.
            result = executor.step(batch, step, self.calls, draw=int(state["draws"]))
            for name, of_call in result.metrics.items():
                metrics.setdefault(name, []).extend(of_call)
            state |= {"prompts": state["prompts"] + count, "draws": state["draws"] + 1}
            drawn.add(result.batch)
        self._tell(drawn, step)
        epochs = {"data_epochs": Last(state["prompts"] / self.loader.epoch_len)}
        metrics[SAMPLING] = [drawn.metrics(wanted) | epochs]
        return self._join(executor, drawn), {**metrics}

    def _tell(self, drawn: Drawn, step: int) -> None:
        """Says where a step could not be filled. Raises RuntimeError where nothing is there and the run is to stop."""
        if len(drawn.groups) == self.loader.batch_size:
            return
        found = (
            f"step {step + 1}: of {drawn.num_prompts} prompts in {drawn.num_draws} draws "
            f"{len(drawn.groups)} have answers that differ in reward, {self.loader.batch_size} are wanted"
        )
        if self.sampling.stops and not drawn.groups:
            raise RuntimeError(f"{found}; give harder or easier prompts, another reward or a larger max_draws")
        logger.warning("%s; %s", found, "it goes on with these" if drawn.groups else "nothing is learned in this step")

    def _join(self, executor: "Executor", drawn: Drawn) -> Batch:
        """Returns the groups that are of use as one batch; where there are none, those of the last draw."""
        groups = drawn.groups or drawn.others
        for number, group in enumerate(groups):
            for sequence in group:
                sequence["group"] = np.array(number, np.int32)
        examples = [sequence for group in groups for sequence in group]
        sizes = executor.sizes.of(self.generate)
        plan = plan_rollout(examples, executor.plan.rollouts[self.generate], sizes)
        return pack(examples, plan, num_segments=sizes.segments(plan.num_segments))
