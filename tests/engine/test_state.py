import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.algorithms.sft import SFT_LOSS
from realjax.core.axes import train_rules
from realjax.core.optimizer_config import OptimizerConfig
from realjax.core.trees import flatten_paths, num_bytes, num_params
from realjax.engine.compiled import Compiled, CompileLog, place_batch
from realjax.engine.forward import make_compute_copy
from realjax.engine.optim import Optimizer
from realjax.engine.state import abstract_train_state, init_train_state, train_state_shardings
from realjax.engine.train import TrainOptions, make_train_step
from tests.given.compare import device_bytes
from tests.given.models import FULL, make_layout, make_model, place_params, quick_jit, random_tree
from tests.given.sequences import make_examples, pack_in_order

MODEL = make_model(**FULL)
OPTIMIZER = Optimizer(config=OptimizerConfig(), total_updates=10)
LAYOUTS = [{}, {"dp": 8, "zero": 3}, {"dp": 4, "tp": 2, "zero": 1}, {"pp": 2, "dp": 2, "tp": 2, "zero": 2, "sp": True}]


def init_state(layout):
    params = place_params(MODEL, random_tree(MODEL), layout)
    return init_train_state(params, OPTIMIZER, train_state_shardings(MODEL, OPTIMIZER, layout))


def described(state):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding.devices_indices_map(x.shape)), state)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_abstract_state_describes_the_real_one(layout):
    layout = make_layout(**layout)
    abstract, state = abstract_train_state(MODEL, OPTIMIZER, layout), init_state(layout)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    assert described(abstract) == described(state)
    assert (int(state.num_updates), int(state.num_skipped)) == (0, 0)


@pytest.mark.parametrize("layout", [LAYOUTS[1], LAYOUTS[3]], ids=str)
def test_a_step_keeps_the_state_where_it_was_and_compiles_once(layout):
    layout, log = make_layout(**layout), CompileLog()
    step = make_train_step(MODEL, SFT_LOSS, OPTIMIZER, layout, TrainOptions())
    out = (train_state_shardings(MODEL, OPTIMIZER, layout), layout.replicated)
    fast = {"xla_backend_optimization_level": 0}
    step = Compiled("train", step, log, donate_argnums=0, out_shardings=out, compiler_options=fast)
    batch = place_batch(
        pack_in_order(make_examples([9, 30, 17]), 32, num_rows=8)[0], train_rules(layout.strategy), layout
    )
    state = init_state(layout)
    before = described(state)
    for _ in range(3):
        state, metrics = step(state, batch)
    assert described(state) == before and len(log.entries) == 1
    assert int(state.num_updates) == 3 and int(metrics["num_skipped"].value) == 0


def test_zero_stages_hold_less_and_less_on_every_device():
    params_bytes = num_bytes(MODEL.abstract)
    axes = flatten_paths(MODEL.axes)
    vectors = sum(4 * leaf.size for path, leaf in flatten_paths(MODEL.abstract).items() if "embed" not in axes[path])
    counters = 8  # optax counts updates for Adam and for the schedule
    held = {}
    for stage in range(4):
        layout = make_layout(dp=8, zero=stage)
        state = init_state(layout)
        rules = train_rules(layout.strategy)
        copy = quick_jit(make_compute_copy(MODEL, rules, layout, jnp.dtype("bfloat16")))(state.params)
        for device in layout.devices:
            held.setdefault(stage, []).append(
                tuple(device_bytes(tree, device) for tree in (state.params, state.opt_state, copy))
            )
        assert len(set(held[stage])) == 1  # no device holds more than another
    shard = (params_bytes - vectors) // 8 + vectors
    assert held[0][0] == (params_bytes, 2 * params_bytes + counters, params_bytes // 2)
    assert held[1][0] == held[2][0] == (shard, 2 * shard + counters, params_bytes // 2)
    assert held[3][0] == (shard, 2 * shard + counters, shard // 2)
    assert shard < params_bytes / 4


def test_tensor_and_pipeline_parallelism_split_what_zero_does_not():
    whole = init_state(make_layout())
    split = init_state(make_layout(pp=2, dp=2, tp=2, zero=1))
    device = jax.devices()[0]
    assert device_bytes(split.opt_state, device) < device_bytes(whole.opt_state, device) / 5
    assert num_params(split.params) == num_params(whole.params)
    jax.tree.map(np.testing.assert_array_equal, split.params, whole.params)
