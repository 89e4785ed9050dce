"""One process of several: runs of GRPO in conversations, each step's own ones, and ones that are begun steps ahead.

Run by test_turns_processes.py as `turns_worker.py <port> <num_processes> <process_id> <folder>`, on the models and data
in the folder. Environments take a random time to answer, another in each process. Prints a line of JSON: conversations
and the metrics of each run's steps, and how many environments were asked in this process.
"""

import importlib
import json
import random
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from realjax.core.metrics import summarize
from realjax.data.packing import unpack
from realjax.reshard.fetch import fetch, fetch_arrays
from realjax.runtime.ahead import Ahead
from realjax.runtime.executor import Executor, StepResult
from tests.given.environments import Chatty
from tests.given.processes import work
from tests.given.runs import Given, build_rl_spec, load_executor

STEPS = 3
RUNS: dict[str, dict[str, Any]] = {
    "each step's own": {"n_gpus_per_node": 2, "allocation_mode": "d2p1m1"},
    # How far rows of later steps come before the parameters change follows from how long environments take. So these
    # do not learn: then their tokens follow from the prompts alone.
    "ahead, on all devices": {
        "n_gpus_per_node": 2, "allocation_mode": "d2p1m1", "staleness": 2, "actor__optimizer__lr": 0.0,
    },
    "ahead, on a device of their own": {
        "n_gpus_per_node": 2, "allocation_mode": "heuristic", "staleness": 2, "actor__optimizer__lr": 0.0,
    },
}  # fmt: skip
OPTIONS: dict[str, Any] = {
    "env__path": "tests.runtime.turns_worker:Slow",
    "env__max_seqlen": 60,
    "rew__path": None,
    "rew__init_from_scratch": None,
    "algo__gen__num_slots": 8,
    "algo__ppo_n_minibatches": 1,
    "algo__kl_ctl": 0,
    "group_size": 2,
    # Rows come into slots as environments answer, so sums are rounded one way or another. By the sign of a gradient
    # that is nothing but that, Adam would change a parameter as much as by any; with a large epsilon it does not.
    "actor__optimizer__lr": 0.02,
    "actor__optimizer__eps": 0.1,
}
ASKED: list[int] = []


class Slow(Chatty):
    """Answers when it likes to, and raises now and then where it is first asked."""

    tries: dict[int, int] = {}  # noqa: RUF012 - of all of them

    def step(self, answer):
        ASKED.append(self.seed)
        time.sleep(0.2 * random.random())
        self.tries[self.seed] = self.tries.get(self.seed, 0) + 1
        if self.seed % 3 == 0 and self.tries[self.seed] == 1:
            raise ConnectionError("once more, please")
        return super().step(answer)


def read_result(result: StepResult) -> dict[str, Any]:
    made = {key: result.batch[key] for key in result.batch if isinstance(result.batch[key], jax.Array)}
    batch = result.batch.replace_arrays(**fetch_arrays(made))
    keys = ("tokens", "loss_mask", "turn_rewards")
    found: dict[str, Any] = {"talks": sorted([np.asarray(one[key]).tolist() for key in keys] for one in unpack(batch))}
    for call, updates in result.metrics.items():
        on_host = [fetch(dict(update)) if call.endswith("train") else update for update in updates]
        found |= {f"{call}/{name}": value for name, value in summarize(on_host).items()}
    return found


def run(executor: Executor) -> list[dict[str, Any]]:
    loader = executor.plan.loader
    if not executor.graph.ahead:
        return [read_result(executor.step(loader.batch(step), step)) for step in range(STEPS)]
    ahead = Ahead(executor, loader, STEPS)
    return [read_result(ahead.step(step)) for step in range(STEPS)]


def main(folder: str) -> None:
    given, root = Given(Path(folder)), Path(folder) / "out"
    random.seed(jax.process_index())
    models = {f"{role}__path": given.folder / role for role in ("actor", "ref")}
    found = {}
    for name, changes in RUNS.items():
        # The module that the option names is this one, but not this script.
        named = importlib.import_module("tests.runtime.turns_worker")
        named.ASKED.clear()
        named.Slow.tries.clear()
        records = run(load_executor(build_rl_spec(given, root, "grpo", **models, **OPTIONS | changes)))
        found[name] = {"records": records, "num_asked": len(named.ASKED)}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    work(main, num_devices=2)
