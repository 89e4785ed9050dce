"""While a model generates, its devices hold its parameters once, in the compute dtype, and one cache."""

import gc

import jax
import numpy as np
import pytest

from realjax.core.axes import generate_rules, tree_shardings
from realjax.core.compute import Compute
from realjax.core.generation_config import GenerationConfig
from realjax.core.layout import Layout, ParallelStrategy
from realjax.core.trees import num_bytes
from realjax.engine.batching import Batcher, generate
from realjax.engine.sampling import Sampler
from realjax.engine.slots import SlotPrograms
from realjax.reshard.apply import reshard
from realjax.runtime.memory import device_bytes
from tests.engine.generation_cases import make_requests
from tests.given.models import make_layout, make_model, place_params, random_tree

MODEL = make_model(num_layers=4, num_kv_heads=8)
GREEDY = GenerationConfig(max_new_tokens=8, min_new_tokens=0, greedy=True)


def bytes_on(devices: tuple[jax.Device, ...]) -> int:
    """Returns the bytes of all arrays on these devices."""
    gc.collect()
    return sum(device_bytes(jax.live_arrays(), device) for device in devices)


@pytest.mark.parametrize(
    ("sizes", "dtype"), [({}, "bfloat16"), ({"tp": 2}, "float32"), ({"pp": 2}, "bfloat16")], ids=str
)
def test_moved_parameters_are_made_ready_as_they_arrive_and_held_once(sizes, dtype):
    strategy = ParallelStrategy(**sizes)
    layout = Layout.of(strategy, jax.devices()[4 : 4 + strategy.size])
    sampler = Sampler(config=GREEDY, eos_ids=(5,), seed=0)
    programs = SlotPrograms(MODEL, layout, sampler, 4, Compute(dtype=dtype))
    params = place_params(MODEL, random_tree(MODEL, scale=0.4), make_layout(dp=2))
    shardings = tree_shardings(MODEL.axes, MODEL.abstract, generate_rules(strategy), layout)
    before, during = bytes_on(layout.devices), []

    def arrived(path: str, array: jax.Array) -> jax.Array | list[jax.Array]:
        ready = programs.prepare_leaf(path, array)
        during.append(bytes_on(layout.devices) - before)
        return ready

    leaves, _ = reshard(params, shardings, dtype=programs.cached.dtype, arrived_fn=arrived)
    ready = programs.join(leaves)
    del leaves
    small = lambda x: x.astype(programs.cached.dtype)
    whole = jax.eval_shape(lambda tree: jax.tree.map(small, tree), MODEL.abstract)
    copies = strategy.size // (2 if sizes else 1) * num_bytes(whole)  # but for norms, which each device has
    held, largest = bytes_on(layout.devices) - before, max(num_bytes({"leaf": x}) for x in jax.tree.leaves(whole))
    assert copies <= held < 1.1 * copies and max(during) <= held + 2 * largest < 1.6 * held
    assert Batcher(programs, ready)._params is ready
    found, expected = (
        generate(programs, tree, make_requests(96)) for tree in (ready, jax.device_put(params, shardings))
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)


@pytest.mark.parametrize("sizes", [{}, {"dp": 2, "tp": 2}, {"pp": 2}], ids=str)
def test_a_cache_that_grows_is_there_twice_in_one_array_at_most(sizes, monkeypatch):
    layout = make_layout(**sizes)
    programs = SlotPrograms(MODEL, layout, Sampler(config=GREEDY, eos_ids=(5,), seed=0), 8, Compute())
    held = lambda slots: sum(array.nbytes for array in jax.tree.leaves(slots.cache))
    before, slots, during, pad = bytes_on(layout.devices), programs.start(128, False), [], programs._pad

    def record(*args):
        grown = pad(*args)
        during.append(bytes_on(layout.devices) - before)
        return grown

    monkeypatch.setattr(programs, "_pad", record)
    old, arrays, at_rest = held(slots), jax.tree.leaves(slots.cache), bytes_on(layout.devices) - before
    grown = programs.grow(slots, 256)
    rest = at_rest - old  # what is not of the cache
    assert held(grown) == 2 * old and all(array.is_deleted() for array in arrays)
    assert len(during) == len(arrays) and max(during) <= rest + 2 * old + max(array.nbytes for array in arrays) + 64
    assert max(during) < rest + 2.2 * old
    assert programs.cache_length(grown) == 256
