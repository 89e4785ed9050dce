"""What adapters save: memory of a training step compiled for H100s, and bytes that go to another layout.

    python -m tools.bench.lora [--sizes 7b 70b] [--rank 16]

The step is of supervised fine-tuning in bfloat16, rows of 2,048 tokens, one a device and micro-batch, layers computed
again in the backward pass. The move is from the layout that trains to that in which answers are drawn.
Needs the extra `aot`; no GPU.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs on a GPU, here or not

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from realjax.algorithms.sft import SFT_LOSS
from realjax.aot.targets import find_target
from realjax.core.axes import inference_rules, optimizer_rules, resolve_sharding, train_rules, tree_shardings
from realjax.core.batch import Batch, find_dims
from realjax.core.compute import Compute
from realjax.core.layout import Layout, ParallelStrategy
from realjax.core.lora_config import LoRAConfig
from realjax.core.optimizer_config import OptimizerConfig
from realjax.core.trees import Tree, map_paths
from realjax.engine.compiled import program_bytes
from realjax.engine.optim import Optimizer
from realjax.engine.state import abstract_train_state, train_state_shardings
from realjax.engine.train import TrainOptions, make_train_step
from realjax.models.build import Model, build_model
from realjax.models.config import ModelConfig
from realjax.reshard.plan import plan_reshard

ROW_LEN, GIB = 2048, 2**30
COMMON: dict[str, Any] = {"family": "llama", "head_dim": 128, "max_positions": 4096}
MODELS: dict[str, dict[str, Any]] = {
    "7b": {"vocab_size": 32000, "hidden_size": 4096, "num_layers": 32, "num_q_heads": 32, "ffn_size": 11008}
    | {"num_kv_heads": 32},
    "70b": {"vocab_size": 128256, "hidden_size": 8192, "num_layers": 80, "num_q_heads": 64, "ffn_size": 28672}
    | {"num_kv_heads": 8},
}
TRAIN = {
    "7b": ParallelStrategy(dp=4, tp=2, sequence_parallel=True, zero_stage=2),
    "70b": ParallelStrategy(dp=4, tp=8, sequence_parallel=True, zero_stage=3),
}
DRAW = {"7b": ParallelStrategy(dp=8), "70b": ParallelStrategy(dp=4, tp=8)}
# Where adapters need no more.
FEWEST = {"7b": ParallelStrategy(), "70b": ParallelStrategy(tp=8, sequence_parallel=True)}


def place(model: Model, layout: Layout, *, is_stored: bool) -> Tree:
    """Returns a model's parameters: float32 masters as the optimizer has them, or bfloat16 as the layers use them."""
    rules = optimizer_rules(layout.strategy) if is_stored else inference_rules(layout.strategy)
    dtype = jnp.float32 if is_stored else jnp.bfloat16
    shardings = tree_shardings(model.axes, model.abstract, rules, layout)
    return map_paths(lambda _, x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s), model.abstract, shardings)


def make_batch(layout: Layout) -> Batch:
    """Returns one row a device with rows of its own."""
    rules, shape = train_rules(layout.strategy), (layout.strategy.dp, ROW_LEN)
    keys = {"loss_mask": jnp.bool_, **dict.fromkeys(("tokens", "positions", "segment_ids"), jnp.int32)}
    sharding = lambda key: resolve_sharding(find_dims(key), shape, rules, layout, key)
    shapes: dict[str, Any] = {
        key: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(key)) for key, dtype in keys.items()
    }
    return Batch(arrays=shapes)


def measure_step(model: Model, layout: Layout) -> int:
    """Returns the bytes of a device that a training step takes, its arguments among them."""
    optimizer = Optimizer(config=OptimizerConfig(), total_updates=100)
    options = TrainOptions(compute=Compute(dtype="bfloat16", remat=True, max_segment_len=ROW_LEN))
    step = make_train_step(model, SFT_LOSS, optimizer, layout, options)
    out = train_state_shardings(model, optimizer, layout), layout.replicated
    state, batch = abstract_train_state(model, optimizer, layout), make_batch(layout)
    base = () if model.config.lora is None else (model.take_frozen(place(model, layout, is_stored=False)),)
    lowered = jax.jit(step, donate_argnums=0, out_shardings=out).lower(state, batch, *base)
    return program_bytes(find_target("h100").compile(lowered))


def count_moved(model: Model, source: Layout, to: Layout) -> int:
    """Returns the bytes of what is trained that go from device to device for a copy in another layout."""
    held = model.take_trained(place(model, source, is_stored=True))
    wanted = model.take_trained(place(model, to, is_stored=False))
    shardings = [jax.tree.map(lambda x: x.sharding, tree) for tree in (held, wanted)]
    return plan_reshard(held, *shardings, dtype=jnp.bfloat16).bytes_moved


def list_rows(size: str, rank: int) -> Iterator[str]:
    """Yields the rows of a table for one size of model."""
    full = build_model(ModelConfig(**COMMON, **MODELS[size]))
    adapted = build_model(replace(full.config, lora=LoRAConfig(rank=rank, alpha=32)))
    target = find_target("h100")
    lay_out = lambda s: Layout.of(s, target.devices(max(1, s.size // 8), min(8, s.size)))
    for name, model, strategy in (
        ("all", full, TRAIN[size]),
        ("adapters", adapted, TRAIN[size]),
        ("adapters", adapted, FEWEST[size]),
    ):
        layout = lay_out(strategy)
        moved = count_moved(model, layout, lay_out(DRAW[size])) if strategy == TRAIN[size] else None
        sent = "" if moved is None else f"{moved / GIB:.3f}"
        peak = measure_step(model, layout) / GIB
        yield f"| {size} | {name} | {model.num_trained_params:,} | {layout} | {peak:.1f} | {sent} |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.lora", description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=tuple(MODELS), default=tuple(MODELS))
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    print("| model | trained | numbers | layout | GiB a device | GiB moved |\n|---|---|---|---|---|---|")
    for size in args.sizes:
        for row in list_rows(size, args.rank):
            print(row, flush=True)


if __name__ == "__main__":
    main()
