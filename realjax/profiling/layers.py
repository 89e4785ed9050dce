"""How long a layer of a model takes, its head and its update: by differences of the programs that runs compile.

One has few layers and a small vocabulary, one has more layers, and one the whole vocabulary. The second less the first
is layers: what they share falls away. The third less its layers is the head.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from realjax.allocation.measured import HeadPoint, LayerPoint, UpdatePoint
from realjax.core.axes import optimizer_rules, train_rules, tree_shardings
from realjax.core.batch import Batch
from realjax.core.compute import Compute
from realjax.core.generation_config import GenerationConfig
from realjax.core.layout import Layout
from realjax.core.loss import Loss, LossSums
from realjax.core.metrics import Mean
from realjax.core.optimizer_config import OptimizerConfig
from realjax.engine.compiled import CompileLog, place_array, place_batch
from realjax.engine.inference import make_inference
from realjax.engine.optim import Optimizer, clip_by_norm
from realjax.engine.products import writes_moments_first
from realjax.engine.sampling import Sampler
from realjax.engine.slot_arrays import CHUNK_LEN
from realjax.engine.slots import SlotPrograms
from realjax.engine.state import init_train_state, train_state_shardings
from realjax.engine.train import TrainOptions, make_gradients
from realjax.models.build import Model, build_model, init_params
from realjax.models.config import ModelConfig
from realjax.profiling.clock import Clock, Probe

FEW, MORE = 1, 3  # times the pattern of a model's layers
SMALL_VOCAB = 256
Program = str
# Of a program: which use of a layer its difference is. Backward programs go both ways; forward is taken off.
PROGRAMS: tuple[Program, ...] = ("forward", "train", "remat", "nll", "decode")
# Of a program beside whose layers a head is measured: which has the same layers. Recomputing them leaves the head as it
# is, and each program saved is seconds of compiling.
SAME_LAYERS: Mapping[Program, Program] = {"forward": "forward", "train": "train", "nll": "train", "decode": "decode"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Rows of so many tokens, on a layout, in a dtype. `uses` are what a run is to do with the model."""

    layout: Layout
    dtype: str
    rows: int
    tokens: int
    programs: tuple[Program, ...] = PROGRAMS

    @property
    def compute(self) -> Compute:
        return Compute(dtype=self.dtype, max_segment_len=self.tokens)


def cut(config: ModelConfig, num_patterns: int, vocab_size: int) -> ModelConfig:
    """Returns the model with other numbers of layers and tokens, as a language model."""
    num_layers = num_patterns * len(config.pattern)
    return replace(config, num_layers=num_layers, vocab_size=vocab_size, is_critic=False)


def measure_layers(
    clock: Clock, config: ModelConfig, case: Case, sharing: float
) -> tuple[list[LayerPoint], list[HeadPoint]]:
    """Returns a layer's and a head's seconds in each of the case's programs, on each of its layout's devices.

    They are multiplied by `sharing`, by which a device is slower when all are busy.
    """
    vocab = config.vocab_size
    small = min(SMALL_VOCAB, vocab)
    of_layers = tuple(program for program in case.programs if program != "nll")
    of_head = tuple(program for program in case.programs if program in SAME_LAYERS)
    sizes = {"few": (FEW, small, of_layers), "more": (MORE, small, of_layers), "head": (FEW, vocab, of_head)}
    probes = {
        (program, name): probe
        for name, (num_patterns, vocab_size, programs) in sizes.items()
        for program, probe in make_probes(
            build_model(cut(config, num_patterns, vocab_size)), replace(case, programs=programs)
        ).items()
    }
    found = {key: seconds * sharing / _num_runs(key[0]) for key, seconds in clock.measure(probes).items()}
    num_layers = len(config.pattern)
    layer = {p: max(found[p, "more"] - found[p, "few"], 0.0) / (MORE - FEW) / num_layers for p in of_layers}
    # All that a program does beside its layers: embedding, final norm, head and loss.
    head = {p: max(found[p, "head"] - FEW * num_layers * layer[SAME_LAYERS[p]], 0.0) for p in of_head}
    sizes_of_layer = {name: getattr(config, name) for name in ("hidden_size", "num_q_heads", "num_kv_heads")}
    sizes_of_layer |= {"head_dim": config.head_dim, "ffn_size": config.ffn_size}
    shared = {"dtype": case.dtype, "tp": case.layout.strategy.tp, "rows": case.rows, "tokens": case.tokens}
    layers = [LayerPoint(use=use, seconds=s, **sizes_of_layer, **shared) for use, s in split_uses(layer).items()]
    heads = [
        HeadPoint(use=use, seconds=s, hidden_size=config.hidden_size, vocab_size=vocab, **shared)
        for use, s in split_uses(head).items()
    ]
    return layers, heads


def _num_runs(program: Program) -> int:
    return CHUNK_LEN if program == "decode" else 1


def split_uses(seconds: Mapping[Program, float]) -> dict[Any, float]:
    """Returns seconds by use: of programs that go both ways, what the way back takes."""
    uses = {name: seconds[name] for name in ("forward", "decode", "nll") if name in seconds}
    for program, use in (("train", "backward"), ("remat", "backward_remat")):
        if program in seconds:
            uses[use] = max(seconds[program] - seconds["forward"], 0.0)
    return uses


def make_probes(model: Model, case: Case) -> dict[Program, Probe]:
    """Returns the case's programs on random parameters, ready to run."""
    rules = train_rules(case.layout.strategy)
    batch = place_batch(make_batch(case, model.config.vocab_size), rules, case.layout)
    shardings = tree_shardings(model.axes, model.abstract, rules, case.layout)
    masters = init_params(model, shardings, 0)
    copies = jax.tree.map(lambda x: x.astype(case.dtype), masters)
    probes: dict[Program, Probe] = {}
    for program in case.programs:
        if program == "decode":
            probes[program] = probe_decode(model, copies, case)
        else:
            params = copies if program == "forward" else masters
            probes[program] = partial(jax.jit(_PROGRAMS[program](model, case)), params, batch)
    return probes


def _make_forward(model: Model, case: Case) -> Callable[..., Any]:
    return make_inference(model, "logprobs", case.layout, case.compute)


def _make_gradients(model: Model, case: Case, *, head: str, remat: bool) -> Callable[..., Any]:
    loss = Loss(head=head, fn=partial(sum_loss, head))  # pyright: ignore[reportArgumentType] - one of its heads
    return make_gradients(model, loss, case.layout, TrainOptions(compute=replace(case.compute, remat=remat)))


def sum_loss(head: str, outputs: Mapping[str, Array], batch: Batch) -> LossSums:
    """Returns the sum of what a head gives for each token, over the tokens that count."""
    weight = jnp.sum(batch["loss_mask"].astype(jnp.float32))
    return LossSums(loss=Mean(jnp.sum(outputs[head]), weight), metrics={})


_PROGRAMS: dict[Program, Callable[[Model, Case], Callable[..., Any]]] = {
    "forward": _make_forward,
    "train": partial(_make_gradients, head="logprobs", remat=False),
    "remat": partial(_make_gradients, head="logprobs", remat=True),
    "nll": partial(_make_gradients, head="nll", remat=False),
}


def make_batch(case: Case, vocab_size: int, num_rows: int | None = None) -> Batch:
    """Returns rows, by default as many as the case has, that each hold one sequence, all of whose tokens count."""
    shape = (num_rows or case.rows, case.tokens)
    tokens = np.random.default_rng(0).integers(vocab_size, size=shape)
    positions = np.broadcast_to(np.arange(case.tokens), shape)
    ones = np.ones(shape, np.int32)
    return Batch.of(tokens=tokens, segment_ids=ones, positions=positions, loss_mask=ones > 0)


def probe_decode(model: Model, params: Any, case: Case) -> Probe:
    """Returns the probe of a chunk of tokens for as many rows as the case has, `case.tokens` in the cache of each."""
    sampler = Sampler(config=GenerationConfig(max_new_tokens=2 * CHUNK_LEN), eos_ids=(), seed=0)
    programs = SlotPrograms(model, case.layout, sampler, case.rows, case.compute, CompileLog())
    held, prepared = [programs.start(case.tokens, has_greedy=False)], programs.prepare(params)
    rows = cast(NamedSharding, held[0].lengths.sharding)
    put = lambda value, dtype: place_array(np.full(case.rows, value, dtype), rows)

    def run() -> Any:
        # The same rows again: they have as many tokens as before, and none has ended.
        slots = replace(
            held[0],
            lengths=put(case.tokens - CHUNK_LEN, np.int32),
            num_generated=put(0, np.int32),
            is_running=put(True, np.bool_),
        )
        held[0], chunk = programs.decode(prepared, slots, -1, CHUNK_LEN)
        return chunk

    return run


def measure_update(clock: Clock, config: ModelConfig, layout: Layout, sharing: float) -> list[UpdatePoint]:
    """Returns how long an update of two models takes, norm and clipping included, by the parameters of a device."""
    probes: dict[int, Probe] = {}
    for num_patterns in (FEW, MORE):
        model = build_model(cut(config, num_patterns, config.vocab_size))
        probes[model.num_params] = probe_update(model, layout)
    seconds = clock.measure(probes)
    return [UpdatePoint(num_params=n // layout.strategy.tp, seconds=s * sharing) for n, s in seconds.items()]


def probe_update(model: Model, layout: Layout) -> Probe:
    """Returns the probe of an update by gradients, as a training step ends with it."""
    optimizer = Optimizer(config=OptimizerConfig(), total_updates=1000)
    shardings = train_state_shardings(model, optimizer, layout)
    held = [init_train_state(init_params(model, shardings.params, 0), optimizer, shardings)]
    grads = init_params(model, tree_shardings(model.axes, model.abstract, optimizer_rules(layout.strategy), layout), 1)

    def update(params: Any, opt_state: Any, grads: Any) -> tuple[Any, Any]:
        grads, norm = clip_by_norm(grads, 1.0)
        order = writes_moments_first(layout)
        # Whether it is applied is not known before, as in a step: the old state is read for that.
        return optimizer.update(grads, opt_state, params, jnp.int32(0), jnp.isfinite(norm), moments_first=order)

    program = jax.jit(update, donate_argnums=(0, 1), out_shardings=(shardings.params, shardings.opt_state))

    def run() -> Any:
        params, opt_state = program(held[0].params, held[0].opt_state, grads)
        held[0] = held[0].replace(params=params, opt_state=opt_state)
        return params

    return run
