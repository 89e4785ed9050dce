"""SFT steps of realjax against a plain PyTorch + transformers loop, alternating, on the same model, data and optimizer.

    python -m tools.bench.sft                       # 10M and 135M parameters, float32, all cores
    python -m tools.bench.sft --sizes 10m --rounds 5 --devices 2     # as many virtual devices on a CPU
    python -m tools.bench.sft --sizes 1b --dtype bfloat16 --row-len 4096 --rows 8 --no-torch     # on a GPU

Two PyTorch loops: `padded` (one row per sequence, padded to the longest) and `packed` (all sequences of a batch in
one row,
without padding, positions restarting, attention kept inside each sequence). Prints real tokens per second of each,
the ratio, and 6 * parameters * tokens/s as a share of the matrix-product rate measured in the same run; and the same
per second of processor time, which says something on a machine that others use too (with OMP_NUM_THREADS=1: PyTorch's
threads spin while they wait).
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from realjax.algorithms.sft import SFT_LOSS
from realjax.core.axes import train_rules
from realjax.core.compute import Compute
from realjax.core.layout import Layout, ParallelStrategy
from realjax.core.optimizer_config import OptimizerConfig
from realjax.core.trees import num_params
from realjax.data.loader import plan_shapes
from realjax.data.packing import pack, pack_rows
from realjax.engine.compiled import Compiled, CompileLog, place_batch
from realjax.engine.optim import Optimizer
from realjax.engine.state import init_train_state, train_state_shardings
from realjax.engine.train import TrainOptions, make_train_step
from realjax.models.build import build_model, init_params
from realjax.models.config import ModelConfig
from tools.bench.devices import start_devices
from tools.bench.workers import start_workers

SHAPES = {  # hidden, layers, query heads, kv heads, head size, ffn, vocabulary, tied
    "10m": (256, 8, 8, 4, 32, 704, 8192, False),
    "135m": (576, 30, 9, 3, 64, 1536, 49152, True),
    "1b": (2048, 16, 32, 8, 64, 8192, 128256, True),
    "3b": (3072, 28, 24, 8, 128, 8192, 128256, True),
    "8b": (4096, 32, 32, 8, 128, 14336, 128256, False),
}
LR = 1e-4
OURS, TORCH_LOOPS = "realjax", ("torch padded", "torch packed")


class Times(NamedTuple):
    """Seconds by the clock and of the process's threads together, or rates by these."""

    clock: float
    processor: float


def main() -> None:
    args = parse_args()
    if args.worker:
        serve(args)
        return
    rate = matmul_rate(args.dtype)
    rates = f"{rate.clock / 1e9:,.0f} GFLOP/s, {rate.processor / 1e9:,.0f} per second of processor time"
    print(f"device {jax.devices()[0]}, matrix product in {args.dtype}: {rates}", flush=True)
    for size in args.sizes:
        compare(size, args, rate)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["10m", "135m"], choices=list(SHAPES))
    parser.add_argument("--batch", type=int, default=8, help="sequences in a batch")
    parser.add_argument("--lengths", type=int, nargs=2, default=(20, 250), help="shortest and longest sequence")
    parser.add_argument("--row-len", type=int, help="length of packed rows; default: what pads least")
    parser.add_argument("--rows", type=int, help="fill so many rows of --row-len instead of --batch sequences")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--devices", type=int, default=1, help="of realjax, virtual ones on a CPU")
    parser.add_argument("--remat", action="store_true")
    parser.add_argument("--steps", type=int, default=4, help="steps of each loop in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--worker", choices=[OURS, *TORCH_LOOPS], help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(size: str, args: argparse.Namespace, rate: Times) -> None:
    """Prints the table of one size."""
    names = [OURS] if args.no_torch else [OURS, *TORCH_LOOPS]
    times: dict[str, list[Times]] = {name: [] for name in names}
    with start_workers("tools.bench.sft", names, "--sizes", size) as workers:
        info = {name: worker.read() for name, worker in workers.items()}[OURS]
        note = f"{info['tokens']} tokens a step; {info['note']}"
        print(f"\n{size}: {info['parameters']:,} parameters, {note}", flush=True)
        for _ in range(args.rounds):
            for name, worker in workers.items():
                times[name].append(Times(*worker.run(args.steps)))
    num_tokens = args.steps * info["tokens"]
    # Others' work delays a loop but hardly adds to its processor time, so the least is the truest.
    rates = {
        name: Times(num_tokens / statistics.median(t.clock for t in one), num_tokens / min(t.processor for t in one))
        for name, one in times.items()
    }
    ours = rates[OURS]
    for name, found in rates.items():
        for label, tokens, full, best in (
            ("tokens/s", found.clock, rate.clock, ours.clock),
            ("tokens/processor s", found.processor, rate.processor, ours.processor),
        ):
            share = 6 * info["parameters"] * tokens / full
            ratio = f"realjax is x{best / tokens:.2f}" if name != OURS else ""
            print(f"  {name:<13}{tokens:8,.0f} {label:<19}{share:6.1%} of the matrix product's  {ratio}", flush=True)


def serve(args: argparse.Namespace) -> None:
    """Warms one loop up, describes it in a line of JSON, then runs as many steps as each line of input says."""
    config = model_config(args.sizes[0])
    examples = draw_sequences(args, config.vocab_size)
    if args.worker == OURS:
        start_devices(args.devices)
        run, parameters, note = realjax_loop(config, examples, args)
    else:
        run, parameters, note = torch_loop(args.worker, args.sizes[0], examples, args.dtype), 0, ""
    run(2)
    tokens = sum(len(example["tokens"]) for example in examples)
    print(json.dumps({"parameters": parameters, "tokens": tokens, "note": note}), flush=True)
    for line in sys.stdin:
        print(json.dumps(timed(lambda line=line: run(int(line)))), flush=True)


def matmul_rate(dtype: str) -> Times:
    """Returns the best FLOP/s of a large square matrix product over several tries."""
    n = 2048 if jax.default_backend() == "cpu" else 8192
    a = jax.random.normal(jax.random.key(0), (n, n), dtype)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    tries = [timed(lambda: product(a, a).block_until_ready()) for _ in range(8)]
    return Times(2 * n**3 / min(t.clock for t in tries), 2 * n**3 / min(t.processor for t in tries))


def timed(fn: Callable[[], object]) -> Times:
    clock, processor = time.perf_counter(), time.process_time()
    fn()
    return Times(time.perf_counter() - clock, time.process_time() - processor)


def draw_sequences(args: argparse.Namespace, vocab_size: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    low, high = args.lengths
    wanted = args.rows * args.row_len if args.rows else None
    examples: list[dict[str, np.ndarray]] = []
    while (len(examples) < args.batch) if wanted is None else (sum(len(e["tokens"]) for e in examples) < wanted * 0.97):
        n = int(rng.integers(low, high + 1))
        tokens = rng.integers(0, vocab_size, n, dtype=np.int32)
        examples.append({"tokens": tokens, "loss_mask": np.arange(n) > 0})
    return examples


def model_config(size: str) -> ModelConfig:
    D, L, N, K, H, F, V, tied = SHAPES[size]
    return ModelConfig(
        family="llama", vocab_size=V, hidden_size=D, num_layers=L, num_q_heads=N, num_kv_heads=K, head_dim=H,
        ffn_size=F, max_positions=8192, tied=tied,
    )  # fmt: skip


def realjax_loop(
    config: ModelConfig, examples: list, args: argparse.Namespace
) -> tuple[Callable[[int], None], int, str]:
    """Returns `run(steps)` of realjax, the number of parameters, and a note on the packing."""
    strategy = ParallelStrategy(dp=args.devices)
    model, layout = build_model(config), Layout.of(strategy)
    lengths = [len(e["tokens"]) for e in examples]
    row_len = args.row_len or plan_shapes([np.array(lengths)], row_multiple=args.devices).row_len
    batch = pack(examples, pack_rows(lengths, row_len))
    optimizer = Optimizer(
        config=OptimizerConfig(lr=LR, lr_scheduler_type="constant", warmup_steps_proportion=0.0), total_updates=1000
    )
    options = TrainOptions(
        compute=Compute(
            dtype=args.dtype,
            attention=args.attention,
            remat=args.remat,
            max_segment_len=max(lengths),
        )
    )
    shardings = train_state_shardings(model, optimizer, layout)
    state = init_train_state(init_params(model, shardings.params, 0), optimizer, shardings)
    step = make_train_step(model, SFT_LOSS, optimizer, layout, options)
    program = Compiled("train", step, CompileLog(), donate_argnums=0)
    placed = place_batch(batch, train_rules(layout.strategy), layout)

    def run(steps: int) -> None:
        nonlocal state
        for _ in range(steps):
            state, metrics = program(state, placed)
        jax.block_until_ready((state, metrics))

    padding = 1 - sum(lengths) / (batch.num_rows * row_len)
    return run, num_params(model.abstract), f"rows {batch.num_rows} x {row_len}, {padding:.0%} padding"


def torch_loop(name: str, size: str, examples: list[dict[str, np.ndarray]], dtype: str) -> Callable[[int], None]:
    """Returns `run(steps)` of a PyTorch loop."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    D, L, N, K, H, F, V, tied = SHAPES[size]
    config = LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=N,
        num_key_value_heads=K, head_dim=H, tie_word_embeddings=tied, max_position_embeddings=8192, use_cache=False,
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    model = model.to(device, getattr(torch, dtype))
    model.config._attn_implementation = "sdpa"
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.05, fused=True)
    tokens = [torch.from_numpy(e["tokens"]).long() for e in examples]
    if name == "torch padded":
        longest = max(map(len, tokens))
        ids = torch.stack([torch.nn.functional.pad(t, (0, longest - len(t))) for t in tokens])
        mask = torch.stack([torch.arange(longest) < len(t) for t in tokens]).long()
        batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    else:
        labels = torch.cat([torch.cat([torch.tensor([-100]), t[1:]]) for t in tokens])[None]
        positions = torch.cat([torch.arange(len(t)) for t in tokens])[None]
        batch = {"input_ids": torch.cat(tokens)[None], "position_ids": positions, "labels": labels}
    batch = {key: tensor.to(device) for key, tensor in batch.items()}

    def run(steps: int) -> None:
        for _ in range(steps):
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()

    return run


if __name__ == "__main__":
    main()
