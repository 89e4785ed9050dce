"""Generation beside training: which parameters draw which answers, and runs that are killed meanwhile."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.core.trees import Tree
from realjax.engine.batching import Batcher, generate
from realjax.record.timeline import measure_calls
from realjax.runtime.ahead import Ahead
from realjax.runtime.executor import Executor, StepResult
from realjax.runtime.rollouts import make_requests, pack_rollout
from realjax.runtime.session import Session, Taken
from realjax.runtime.sizes import Sizes
from tests.given.commands import Trial
from tests.given.compare import as_numbers, find_differing, without_clocks
from tests.given.runs import GROUPS, LAYOUTS, Given, build_rl_spec, load_executor
from tests.runtime.kills import Killed

pytestmark = pytest.mark.usefixtures("quick")
STEPS = 4  # 32 prompts, 8 at a time
# Few slots for answers of different lengths: while some of a step's are drawn, others of the next are begun.
OPTIONS: dict[str, Any] = {"algo__gen__max_new_tokens": 16, "algo__gen__num_slots": 8, "algo__ppo_n_minibatches": 1}
STILL = {"actor__optimizer__lr": 0, "algo__kl_ctl": 0}


def make_run(given: Given, root: Path, **changes: Any) -> Executor:
    return load_executor(build_rl_spec(given, root, "grpo", **OPTIONS | changes))


def take_steps(executor: Executor) -> Iterator[StepResult]:
    loader = executor.plan.loader
    ahead = Ahead(executor, loader, loader.total_steps)
    yield from (ahead.step(step) for step in range(loader.total_steps))


def find_weights(results: Sequence[StepResult]) -> list[dict[str, float]]:
    return [as_numbers(list(result.metrics["corrections"]))[0] for result in results]


def find_ages(results: Sequence[StepResult]) -> list[dict[str, float]]:
    return [as_numbers(list(result.metrics["ages"]))[0] for result in results]


def test_a_batch_is_drawn_by_the_parameters_of_the_step_before(given, tmp_path):
    executor = make_run(given, tmp_path, staleness=1, algo__kl_ctl=0)
    steps, versions, results = take_steps(executor), list[Tree](), list[StepResult]()
    for _ in range(STEPS):
        versions.append(jax.tree.map(jnp.copy, executor.params("actor")))
        results.append(next(steps))
        # What is drawn is of the next step, and of no step after the last.
        assert {row.step for row in executor.rows} == ({len(results)} if len(results) < STEPS else set())
    (mfc,) = [call for call in executor.graph.mfcs if call.name == "actor_gen"]
    loader, slots, shape = executor.plan.loader, executor.programs.slots(mfc), executor.plan.rollouts[mfc.name]
    sizes = Sizes().of(mfc.name)
    for step, result in enumerate(results):
        requests = make_requests(loader.batch(step), mfc, step)
        answers = generate(slots, versions[max(0, step - 1)], requests)
        expected = pack_rollout(requests, answers, mfc, shape, sizes=sizes)
        for key in ("tokens", "logprobs", "has_eos"):
            np.testing.assert_array_equal(result.batch[key], expected[key])
    heads = [np.asarray(version["head"]["kernel"]) for version in versions]
    assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(heads, heads[1:]))
    ages = find_ages(results)
    assert [(age["token_age"], age["max_token_age"]) for age in ages] == [(0, 0), (1, 1), (1, 1), (1, 1)]
    assert all(age["interrupted_share"] == 0 for age in ages)
    # By default stale answers are corrected for: after the first step, the sampler is no longer the actor.
    weights = find_weights(results)
    assert weights[0]["sampler_kl"] < 1e-8 and all(one["sampler_kl"] > 1e-5 for one in weights[1:])


@pytest.fixture(scope="module")
def tokens_in_step(given: Given, tmp_path_factory: pytest.TempPathFactory) -> list[np.ndarray]:
    """The answers of a run whose actor does not change and whose steps draw their own."""
    executor = make_run(given, tmp_path_factory.mktemp("sync"), **STILL)
    loader = executor.plan.loader
    return [np.asarray(executor.step(loader.batch(step), step).batch["tokens"]) for step in range(STEPS)]


CASES = [
    pytest.param(*case, marks=() if case[1] == "one device" else pytest.mark.slow, id=f"{case[0]}, {case[1]}")
    for case in ((1, "one device"), (3, "one device"), (2, "tensor"), (2, "pipeline"), (2, "halves"))
]


@pytest.mark.parametrize(("staleness", "layout"), CASES)
def test_without_a_learning_rate_age_changes_nothing(staleness, layout, tokens_in_step, given, tmp_path):
    """Answers are those of a run without staleness, interrupted or not; weights are 1 to float32's rounding."""
    sizes = {name: size for name, size in LAYOUTS[layout].items() if not name.startswith("critic")}
    # Nor does it change anything that rows interrupted go on with several tokens a round.
    proposes = {"algo__gen__prompt_lookup_num_tokens": 2} if staleness == 3 else {}
    executor = make_run(given, tmp_path, staleness=staleness, **STILL, **sizes, **proposes)
    results = list(take_steps(executor))
    counted = {name for step in range(STEPS) for name in measure_calls(executor.timeline.of_step(step))}
    assert ("tokens_per_round/actor_gen" in counted) == bool(proposes)
    for result, expected in zip(results, tokens_in_step, strict=True):
        found = np.asarray(result.batch["tokens"])
        assert sorted(found[found > 0]) == sorted(expected[expected > 0])
    for weights in find_weights(results):
        assert weights["correction_weight"] == pytest.approx(1, abs=1e-5) and weights["correction_cut"] == 0
        assert weights["correction_ess"] == pytest.approx(1, abs=1e-5)
    ages = find_ages(results)
    # No more is begun than free slots take.
    assert max(age["max_token_age"] for age in ages) == min(staleness, 2)
    assert (max(age["interrupted_share"] for age in ages) > 0) == (staleness > 1)


@pytest.mark.parametrize("experiment", GROUPS)
def test_what_no_update_changes_is_done_ahead_of_training(experiment, given, tmp_path):
    for eta, judges in ((None, {"ref_inf"}), (0.1, set())):
        spec = build_rl_spec(given, tmp_path, experiment, staleness=1, algo__kl_ctl=0.1, algo__ref_ema_eta=eta)
        graph = spec.graph
        assert graph.ahead == {"actor_gen", "rew_inf", "rewards"} | judges
        order = [call.name for call in graph.order]
        assert order.index("actor_train") < order.index("actor_gen")
        assert {"actor_inf", "corrections", "ages"} <= {*order}
        assert not build_rl_spec(given, tmp_path, experiment).graph.ahead


def kill(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, number: int, *, after: bool = False) -> None:
    """Lets a method stop everything at its call of this number, before or after it does what it does."""
    method: Callable[..., Any] = getattr(owner, name)
    calls = list[None]()

    def killed(*args: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == number and not after:
            raise Killed
        result = method(*args, **options)
        if len(calls) == number:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, killed)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[int]]:
    """By step, the numbers of the prompts that it was last trained on."""
    prompts, record = dict[int, list[int]](), Session.record

    def keep(self: Session, taken: Taken) -> None:
        batch = taken.result.batch
        first = np.asarray(batch["positions"]) == 0
        rows, times = np.nonzero(first & (np.asarray(batch["segment_ids"]) > 0))
        ids = np.asarray(batch["prompt_id"])[rows, np.asarray(batch["segment_ids"])[rows, times] - 1]
        prompts[taken.step] = sorted(ids.tolist())
        record(self, taken)

    monkeypatch.setattr(Session, "record", keep)
    return prompts


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # what is killed closes nothing
@pytest.mark.filterwarnings(
    "ignore:.*Event loop is closed|Exception ignored in:pytest.PytestUnraisableExceptionWarning"
)
def test_a_run_killed_with_rows_in_flight_ends_like_one_that_was_not(given, tmp_path, monkeypatch, trained):
    options = {**OPTIONS, "staleness": 2, "recover_mode": "auto", "save_freq_steps": 1, "algo__kl_ctl": 0}
    options |= {"rew__path": None, "reward__fn": "tests.given.rewards:shortness"}
    whole, killed = (
        Trial(given=given, root=tmp_path, name=name, experiment="grpo", options=options) for name in ("whole", "killed")
    )
    assert whole.run() == 0
    prompts = sorted(4 * [*range(32)])
    assert sorted(sum(trained.values(), [])) == prompts
    moments = (
        (Session, "record", 2, True),  # a step is trained on and not saved, the one before it is
        (Batcher, "poll", 6, False),  # answers are half drawn
    )
    for owner, name, number, after in moments:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill(patch, owner, name, number, after=after)
            killed.run()
    assert killed.run() == 0
    assert sorted(sum(trained.values(), [])) == prompts
    for trial in (whole, killed):
        assert trial.steps() == [1, 2, 3, 4]
        assert max(record["interrupted_share"] for record in trial.metrics("train")) > 0
    assert not find_differing(killed.state(STEPS, "actor"), whole.state(STEPS, "actor"))
    found, expected = (without_clocks(trial.metrics(), "memory_mib", "moved_mib") for trial in (killed, whole))
    assert found == expected
