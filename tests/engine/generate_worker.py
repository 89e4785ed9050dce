"""One process of two: generates on layouts that span both, or belong to the other one, and compares with one device.

Run by test_generate_processes.py as `generate_worker.py <port> <num_processes> <process_id>`.
"""

import jax
import numpy as np

from realjax.core.axes import generate_rules, tree_shardings
from realjax.core.compute import Compute
from realjax.core.generation_config import GenerationConfig
from realjax.core.layout import Layout, ParallelStrategy
from realjax.core.trees import Tree, map_paths
from realjax.engine.batching import Batcher, Generation, Request, generate
from realjax.engine.sampling import Sampler
from realjax.engine.slots import SlotPrograms
from realjax.models.build import Model
from realjax.models.config import LayerKind, MoEConfig
from realjax.reshard.fetch import fetch
from tests.given.models import make_model, random_tree
from tests.given.processes import work

CONFIG = GenerationConfig(max_new_tokens=10, min_new_tokens=2, top_k=20, top_p=0.9)


def place(model: Model, params: Tree, layout: Layout) -> Tree:
    shardings = tree_shardings(model.axes, model.abstract, generate_rules(layout.strategy), layout)

    def one(_: str, x: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index], dtype=x.dtype)

    return map_paths(one, params, shardings)


def run(model: Model, params: Tree, devices: list[jax.Device], num_slots: int, **sizes: int) -> list[Generation]:
    layout = Layout.of(ParallelStrategy(**sizes), devices)
    sampler = Sampler(config=CONFIG, eos_ids=tuple(range(6, 14)), seed=3)
    programs = SlotPrograms(model, layout, sampler, num_slots, Compute())
    rng = np.random.default_rng(0)
    requests = [
        Request(tokens=rng.integers(6, 96, n).astype(np.int32), row_id=i, is_greedy=i == 2)
        for i, n in enumerate([3, 17, 8, 1, 30])
    ]
    placed, fetch_fn = place(model, params, layout), fetch if sizes else None
    batcher = Batcher(programs, placed, fetch_fn=fetch_fn, chunk_len=3)
    numbers = batcher.submit(requests[:3])
    for _ in range(4):
        batcher.poll()
    numbers += batcher.submit(requests[3:])
    taken = batcher.take_out([0, 4])
    again = dict(zip(batcher.submit(taken.values()), taken))
    polled = batcher.results()
    while batcher.poll():
        polled |= batcher.results()
    polled |= batcher.results()
    polled = {again.get(number, number): generation for number, generation in polled.items()}
    whole = generate(programs, placed, requests, fetch_fn=fetch_fn)
    compare(whole, [polled[number] for number in numbers])
    return whole


def compare(expected: list[Generation], found: list[Generation]) -> None:
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.kept, b.kept)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
        assert a.ended == b.ended


def main() -> None:
    model = make_model()
    params = random_tree(model, scale=0.4)
    expected = run(model, params, jax.local_devices()[:1], 2)
    devices = jax.devices()
    of_second = [device for device in devices if device.process_index == 1]
    split_pairs = [devices[i] for i in (0, 4, 1, 5)]  # the pipe's stages and the data's rows in both processes
    for found in (
        run(model, params, split_pairs, 4, dp=2, pp=2),
        run(model, params, of_second, 4, dp=2, tp=2),
    ):
        compare(expected, found)
    model = make_model(pattern=(LayerKind(feed_forward=MoEConfig(num_experts=4, experts_per_token=2, expert_size=16)),))
    params = random_tree(model, scale=0.4)
    # Each two devices that share experts are of both processes.
    compare(run(model, params, jax.local_devices()[:1], 2), run(model, params, split_pairs, 4, dp=4, ep=2))
    print("all equal", flush=True)


if __name__ == "__main__":
    work(main, num_devices=8)
