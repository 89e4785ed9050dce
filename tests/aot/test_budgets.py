"""What a training step sends between H100s is what a formula says: nothing twice, nothing wider or larger than needed.

Two layers of the size of Llama-7B's, packed rows, bfloat16; layers are computed again in the backward pass, but for one
case. With L layers of parameters P_l a device, an embedding and a head of P_v each, M micro-batches, and A bytes of a
micro-batch's hidden states on a device:

- over `data`, stages 0 to 2: every gradient once a step in float32; from stage 1 on the compute copy once in bfloat16.
- stage 3: parameters of layers twice a micro-batch (forward and backward) and the head once, in bfloat16; their
  gradients once a micro-batch in float32. The table is never gathered: looked-up rows are swapped, there and back.
- over `tensor`, sequence parallel: a layer gathers A twice in each of forward, recomputation and backward, and scatters
  it twice, once and twice. The embedding scatters A and its gradient gathers it; the head the other way round, and it
  gathers once more where its logits are computed again. A critic's head needs no whole rows.
- in P pipeline stages a device has 1/P of all that, M is larger, and layers and embedding run F = M + P - 1 times.
  Hidden states are handed on, and back. They cross all stages from the embedding, where the sum over the parts of the
  vocabulary is one over the stages too, to the head, and both ways back as gradients.
"""

import math
from collections import Counter
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import pytest

from realjax.algorithms.sft import SFT_LOSS
from realjax.aot.hlo import collectives
from realjax.core.axes import resolve_sharding, train_rules
from realjax.core.batch import Batch, find_dims
from realjax.core.compute import Compute
from realjax.core.layout import Layout, ParallelStrategy
from realjax.core.loss import Loss, LossSums
from realjax.core.metrics import Mean
from realjax.core.optimizer_config import OptimizerConfig
from realjax.core.trees import num_params
from realjax.engine.optim import Optimizer
from realjax.engine.pipeline import num_step_batches
from realjax.engine.state import abstract_train_state, train_state_shardings
from realjax.engine.train import TrainOptions, make_train_step
from realjax.models.build import Model
from tests.given.gpus import compile_for_gpus, h100s
from tests.given.models import make_model

pytestmark = pytest.mark.aot

WIDTHS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_q_heads": 32,
    "num_kv_heads": 32,
    "head_dim": 128,
    "ffn_size": 11008,
    "max_positions": 4096,
}
ROW_LEN = 1024
# A device's numbers for a few scalars and vectors: norms, masks, loss sums.
SMALL = 5e6


@dataclass(frozen=True, kw_only=True)
class Step:
    """A training step: of eight rows a device and micro-batch."""

    head: str = "nll"
    changes: dict = field(default_factory=dict)  # of the model
    num_mbs: int = 4
    remat: bool = True
    dp: int = 4
    pp: int = 1
    tp: int = 2
    sp: bool = True
    zero: int = 0

    @property
    def model(self) -> Model:
        return make_model(**WIDTHS | self.changes)

    @property
    def layout(self) -> Layout:
        strategy = ParallelStrategy(dp=self.dp, pp=self.pp, tp=self.tp, sequence_parallel=self.sp, zero_stage=self.zero)
        return Layout.of(strategy, h100s(min(8, strategy.size), math.ceil(strategy.size / 8)))

    @property
    def num_rows(self) -> int:
        return 8 * self.dp * self.num_mbs

    def __str__(self) -> str:
        given = {name: value for name, value in vars(self).items() if value != getattr(Step(), name)}
        return ", ".join(f"{name} {value}" for name, value in given.items()) or "dp 4, tp 2, sp"


def train_traffic(step: Step, layout: Layout) -> Counter[tuple]:
    """Returns the bytes a step of each `(axes, kind, dtype)` of collectives, those of a few vectors left out."""
    model, loss = step.model, LOSSES[step.head]
    rules, keys = train_rules(layout.strategy), {"loss_mask": jnp.bool_}
    keys |= dict.fromkeys(("tokens", "positions", "segment_ids"), jnp.int32)
    shape = (step.num_rows, ROW_LEN)
    place = lambda key: resolve_sharding(find_dims(key), shape, rules, layout, key)
    batch = Batch(arrays={key: jax.ShapeDtypeStruct(shape, dtype, sharding=place(key)) for key, dtype in keys.items()})
    optimizer = Optimizer(config=OptimizerConfig(), total_updates=100)
    compute = Compute(dtype="bfloat16", remat=step.remat, max_segment_len=ROW_LEN)
    step_fn = make_train_step(model, loss, optimizer, layout, TrainOptions(compute=compute, num_mbs=step.num_mbs))
    places = train_state_shardings(model, optimizer, layout), layout.replicated
    state = abstract_train_state(model, optimizer, layout)
    lowered = jax.jit(step_fn, donate_argnums=0, out_shardings=places).lower(state, batch)
    traffic: Counter[tuple] = Counter()
    for one in collectives(compile_for_gpus(lowered).as_text() or ""):
        traffic[one.axes(layout), one.kind, one.dtype] += one.total_bytes
    return Counter({key: size for key, size in traffic.items() if size > SMALL})


def expected_traffic(step: Step, layout: Layout) -> dict[tuple, float]:
    """Returns the formula's bytes."""
    model, num_rows, data, tensor, pipe = step.model, step.num_rows, ("data",), ("tensor",), ("pipe",)
    s, config = layout.strategy, model.config
    M = num_step_batches(num_rows, step.num_mbs, layout) if s.pp > 1 else step.num_mbs
    F, L = M + s.pp - 1, config.num_layers // s.pp
    layers = num_params(model.abstract["layers"]) / (s.tp * s.pp)
    table = config.vocab_size * config.hidden_size / (s.tp * s.pp)
    kernel = 0 if config.is_critic else table
    params = layers + (table if config.tied else table + kernel)
    hidden = num_rows // s.dp // M * ROW_LEN * config.hidden_size * 2  # A
    split = hidden / (s.tp if s.sequence_parallel else 1)
    traffic: Counter[tuple] = Counter()
    if s.dp > 1 and s.zero_stage == 0:
        traffic[data, "all-reduce", "f32"] = 4 * params
    elif s.zero_stage in (1, 2):
        traffic |= {(data, "reduce-scatter", "f32"): 4 * params, (data, "all-gather", "bf16"): 2 * params}
    elif s.zero_stage == 3:
        traffic[data, "all-gather", "bf16"] = 2 * (2 * F * layers + M * kernel)
        traffic[data, "reduce-scatter", "f32"] = 4 * (F * layers + M * kernel)
        traffic[data, "all-to-all", "bf16"] = 2 * F * split
    if s.pp > 1:
        traffic[(*pipe, *tensor), "all-reduce", "bf16"] = F * hidden
        traffic[pipe, "all-reduce", "bf16"] = (2 * M + F) * split
        traffic[pipe, "collective-permute", "bf16"] = (M + 2 * F) * split
    gathers, scatters = {"nll": (1, 1), "logprobs": (2, 1), "values": (0, 0)}[step.head]
    if s.sequence_parallel:
        traffic[tensor, "all-gather", "bf16"] = hidden * (6 * L * F + F + gathers * M)
        traffic[tensor, "reduce-scatter", "bf16"] = hidden * (5 * L * F + (F if s.pp == 1 else 0) + scatters * M)
    elif s.tp > 1:
        traffic[tensor, "all-reduce", "bf16"] = hidden * (5 * L * F + F + scatters * M)
    return traffic


def logprobs_of(outputs, batch) -> LossSums:
    mask = batch["loss_mask"].astype(jnp.float32)
    loss = jnp.sum((0.01 * outputs["entropy"] - outputs["logprobs"]) * mask)
    return LossSums(Mean(loss, jnp.sum(mask)), {})


def values_of(outputs, batch) -> LossSums:
    mask = batch["loss_mask"].astype(jnp.float32)
    return LossSums(Mean(jnp.sum(jnp.square(outputs["values"]) * mask), jnp.sum(mask)), {})


LOSSES = {
    "nll": SFT_LOSS,
    "logprobs": Loss(head="logprobs", fn=logprobs_of, needs_entropy=True),
    "values": Loss(head="values", fn=values_of),
}
STEPS = [
    Step(),
    Step(sp=False),
    Step(tp=4),  # on two hosts
    Step(zero=1),
    Step(zero=1, num_mbs=1),  # XLA would gather in float32 where the copy is used once
    Step(zero=3),
    Step(zero=3, dp=8, tp=1, sp=False),
    Step(zero=3, dp=8, tp=1, sp=False, remat=False),  # whole parameters are gathered again, not kept
    Step(pp=2, dp=2),
    Step(pp=2, dp=2, zero=3),
    Step(changes={"tied": True}),
    Step(head="logprobs"),
    Step(head="logprobs", changes={"tied": True}, zero=3),
    Step(head="values", changes={"is_critic": True}),
]


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_a_training_step_sends_what_the_formula_says(step, capfd):
    layout = step.layout
    found, expected = train_traffic(step, layout), expected_traffic(step, layout)
    assert found.keys() == expected.keys(), (found, expected)
    for key, size in expected.items():
        assert 0.95 * size <= found[key] <= 1.05 * size, (key, found[key], size)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
