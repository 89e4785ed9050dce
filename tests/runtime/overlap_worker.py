"""One process of several: trains two roles a step, `long` on the first of two devices and `short` on the second.

Run by test_overlap.py as `overlap_worker.py <port> <num_processes> <process_id>`. Process 0 prints a line of JSON: for
each step the losses, and when each call began and ended.
"""

import json

import jax

from realjax.algorithms.sft import SFT_LOSS
from realjax.core.layout import Layout, ParallelStrategy
from realjax.core.processes import is_first
from realjax.dataflow.graph import DataflowGraph, Train
from realjax.reshard.fetch import fetch
from realjax.runtime.executor import Executor
from tests.given.models import make_model
from tests.given.processes import work
from tests.given.sequences import make_examples, pack_in_order
from tests.given.specs import make_executor, make_role, make_state

STEPS = 3
# The work of one is hundreds of times that of the other, which no other load of the machine makes up for.
SIZES = {
    "long": {"hidden_size": 128, "num_layers": 12, "ffn_size": 512, "head_dim": 16},
    "short": {"hidden_size": 32, "num_layers": 1},
}


def make_overlap() -> Executor:
    layouts, roles = {}, {}
    for i, (name, sizes) in enumerate(SIZES.items()):
        layouts[name] = Layout(ParallelStrategy(), (jax.devices()[i],))
        roles[name] = make_role(make_model(**sizes), layouts[name], name)
    calls = tuple(Train(name=name, role=name, inputs=("tokens", "loss_mask"), loss=SFT_LOSS) for name in SIZES)
    graph = DataflowGraph(calls, frozenset({"tokens", "loss_mask"}))
    return make_executor(graph, layouts, roles, {name: make_state(role) for name, role in roles.items()})


def main() -> None:
    executor, lines = make_overlap(), []
    for step in range(STEPS):
        batch, _ = pack_in_order(make_examples([64] * 16, seed=step), 64, num_rows=16)
        metrics = executor.step(batch, step).metrics
        losses = {name: float(fetch(dict(update))["loss"].value) for name, (update,) in metrics.items()}
        times = {record.name: (record.start, record.end) for record in executor.timeline.of_step(step)}
        lines.append({"losses": losses, "times": times})
    if is_first():
        print(json.dumps(lines), flush=True)


if __name__ == "__main__":
    work(main, num_devices=2)
