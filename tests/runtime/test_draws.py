"""Dynamic sampling: a step is filled with groups of use, within a bound, and no prompt of the stream is lost."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from realjax.allocation.plan import RolloutShape
from realjax.core.batch import Batch
from realjax.core.generation_config import GenerationConfig
from realjax.core.metrics import summarize
from realjax.core.segments import segment_mask
from realjax.data.loader import Loader
from realjax.data.packing import unpack
from realjax.data.prompts import PromptDataset
from realjax.dataflow.graph import DataflowGraph, Generate, Host
from realjax.dataflow.run import DynamicSampling
from realjax.engine.batching import Generation
from realjax.runtime.draws import FIRST, SAMPLING, GroupSampler
from realjax.runtime.executor import StepResult
from realjax.runtime.rollouts import make_requests, pack_rollout
from realjax.runtime.sizes import Sizes

NUM_PROMPTS, BATCH, SAMPLES = 23, 6, 3
GENERATE = Generate(
    name="gen",
    role="actor",
    inputs=("prompts",),
    outputs=("tokens", "loss_mask", "logprobs", "has_eos", "prompt_id", "group", "sample_id"),
    config=GenerationConfig(max_new_tokens=4),
    eos_ids=(2,),
    num_prompts=BATCH,
    num_samples=SAMPLES,
)
JUDGE, LATER = (
    Host(name=name, fn=lambda arrays, state: None, inputs=inputs, outputs=(key,))  # pyright: ignore - not called
    for name, inputs, key in (("judge", ("prompt_id",), "rewards"), ("later", ("rewards",), "advantages"))
)
GRAPH = DataflowGraph((GENERATE, JUDGE, LATER), frozenset({"prompts"}))


def make_loader() -> Loader:
    lens = 1 + np.arange(NUM_PROMPTS) % 5
    dataset = PromptDataset(
        ids=tuple(range(NUM_PROMPTS)),
        tokens=np.arange(lens.sum(), dtype=np.int32) % 50 + 3,
        offsets=np.cumsum([0, *lens]),
        rows=tuple({"id": i} for i in range(NUM_PROMPTS)),
    )
    return Loader(dataset, batch_size=BATCH, seed=4, num_epochs=3)


class Scripted:
    """What the sampler asks of an executor: answers of one token, and rewards that differ where `differs` says so."""

    def __init__(self, differs: Any, state: dict[str, float] | None = None) -> None:
        self.differs, self.controls = differs, {SAMPLING: dict(state or FIRST)}
        self.plan = SimpleNamespace(rollouts={"gen": RolloutShape(row_len=32, row_multiple=2, num_slots=8)})
        self.sizes = Sizes()
        self.takes: list[list[int]] = []  # the prompts of each draw
        self.randomness: list[tuple[int, int]] = []

    @property
    def asked(self) -> list[int]:
        """All prompts, in order."""
        return [prompt for take in self.takes for prompt in take]

    def step(self, batch: Batch, step: int, calls: Any, draw: int) -> StepResult:
        for call in calls:
            batch = self._run(call, batch, draw)
        return StepResult(batch, {})

    def _run(self, call: Any, batch: Batch, draw: int) -> Batch:
        if isinstance(call, Generate):
            requests = make_requests(batch, call, draw)
            self.takes.append([request.row_id for request in requests[::SAMPLES]])
            self.randomness += [(request.row_id, request.sample_id) for request in requests]
            one = Generation(tokens=np.array([9]), logprobs=np.array([-1.0]), ended=True, kept=None)
            return pack_rollout(requests, [one] * len(requests), call, self.plan.rollouts["gen"])
        differ = np.vectorize(self.differs, otypes=[float])(batch["prompt_id"])
        exists = segment_mask(batch["segment_ids"], batch["prompt_id"].shape[1])
        rewards = np.where(exists, 1 + differ * batch["sample_id"], 0).astype(np.float32)
        return batch.with_arrays(rewards=rewards, is_failed=np.isnan(rewards))


def draw(
    executor: Scripted, steps: range, **sampling: Any
) -> list[tuple[list[dict[str, np.ndarray]], dict[str, float]]]:
    """Returns the sequences and the sampler's metrics of each step."""
    sampler, found = GroupSampler(DynamicSampling(**{"max_draws": 10, **sampling}), GRAPH, make_loader()), []
    assert sampler.names == {"gen", "judge"}
    for step in steps:
        batch, metrics = sampler.draw(executor, step)  # pyright: ignore[reportArgumentType]
        found.append((unpack(batch), summarize(metrics[SAMPLING])))
    return found


def stream(count: int) -> list[int]:
    """Returns the first prompts of the run's data, epoch after epoch."""
    loader = make_loader()
    return [int(i) for epoch in range(9) for i in loader._dataset.order(4, epoch, True)][:count]


def test_a_step_is_full_of_groups_of_use_and_prompts_are_taken_one_after_the_other():
    executor = Scripted(lambda prompt: prompt % 3 == 0)
    steps = draw(executor, range(4))
    used = [prompt for prompt in executor.asked if prompt % 3 == 0]
    for number, (sequences, metrics) in enumerate(steps):
        groups = {int(one["group"]): int(one["prompt_id"]) for one in sequences}
        assert [groups[i] for i in range(BATCH)] == used[number * BATCH : (number + 1) * BATCH]
        assert len(sequences) == BATCH * SAMPLES and metrics["batch_filled"] == 1
    assert len(executor.asked) > 2 * NUM_PROMPTS
    left = stream(len(executor.asked))
    for take in executor.takes:  # in the order in which they are packed
        assert sorted(take) == sorted(left[: len(take)])
        del left[: len(take)]
    assert len(set(executor.randomness)) == len(executor.randomness)
    total = lambda name: sum(metrics[name] for _, metrics in steps)
    assert total("drawn_prompts") == len(executor.asked) == executor.controls[SAMPLING]["prompts"]
    assert total("drawn_tokens") == SAMPLES * len(executor.asked)
    assert total("draws") == executor.controls[SAMPLING]["draws"] > 4
    assert steps[0][1]["informative_share"] == BATCH / steps[0][1]["drawn_prompts"]
    assert steps[-1][1]["data_epochs"] == len(executor.asked) / NUM_PROMPTS


def test_prompts_whose_answers_all_failed_are_of_no_use():
    executor = Scripted(lambda prompt: np.nan if prompt % 2 else 1)
    for sequences, metrics in draw(executor, range(2)):
        assert all(int(one["prompt_id"]) % 2 == 0 for one in sequences) and metrics["batch_filled"] == 1
        assert metrics["drawn_reward"] == 2 and metrics["informative_share"] < 1


def test_where_all_answers_differ_steps_are_those_of_the_loader():
    executor, loader = Scripted(lambda prompt: True), make_loader()
    steps = draw(executor, range(3))
    for number, (sequences, metrics) in enumerate(steps):
        assert sorted({int(one["prompt_id"]) for one in sequences}) == sorted(loader.ids(number))
        assert metrics["draws"] == 1 and metrics["drawn_reward"] == 2


def test_it_goes_on_from_its_state_as_if_it_had_not_stopped():
    rule = lambda prompt: prompt % 4 == 1
    whole, first = Scripted(rule), Scripted(rule)
    expected = draw(whole, range(5))
    found = draw(first, range(2))
    again = Scripted(rule, first.controls[SAMPLING])
    found += draw(again, range(2, 5))
    assert first.asked + again.asked == whole.asked
    assert first.randomness + again.randomness == whole.randomness
    for (ours, metrics), (theirs, expected_metrics) in zip(found, expected, strict=True):
        assert metrics == expected_metrics
        assert [one["tokens"].tolist() for one in ours] == [one["tokens"].tolist() for one in theirs]


def test_the_bound_holds_and_a_step_goes_on_with_what_is_there(caplog):
    executor = Scripted(lambda prompt: prompt == 3)
    ((sequences, metrics),) = draw(executor, range(1), max_draws=5)
    assert metrics["draws"] == 5 and metrics["drawn_prompts"] == len(executor.asked) >= 5 * (BATCH - 2)
    groups = {(int(one["group"]), int(one["prompt_id"])) for one in sequences}
    assert {prompt for _, prompt in groups} == {3} and len(groups) == executor.asked.count(3)
    assert metrics["batch_filled"] == len(groups) / BATCH
    assert "have answers that differ in reward, 6 are wanted; it goes on with these" in caplog.text


def test_where_nothing_is_of_use_it_goes_on_without_an_update_or_stops(caplog):
    executor = Scripted(lambda prompt: False)
    ((sequences, metrics),) = draw(executor, range(1), max_draws=3)
    assert metrics["draws"] == 3 and metrics["drawn_prompts"] == 3 * BATCH and metrics["batch_filled"] == 0
    assert len(sequences) == BATCH * SAMPLES and len({float(one["rewards"]) for one in sequences}) == 1
    assert "step 1: of 18 prompts in 3 draws 0 have answers that differ in reward" in caplog.text
    with pytest.raises(RuntimeError, match="^step 1: of 18 prompts in 3 draws 0 have .*; give harder or easier"):
        draw(Scripted(lambda prompt: False), range(1), max_draws=3, stops=True)
