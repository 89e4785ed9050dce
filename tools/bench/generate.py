"""Tokens/s of realjax's sampler against transformers' `generate`, alternating: same model, prompts and options.

    python -m tools.bench.generate                                      # 10M and 135M parameters, float32, all cores
    python -m tools.bench.generate --sizes 135m --checkpoint FOLDER     # a Llama checkpoint's weights
    python -m tools.bench.generate --sizes 10m --batches 32 --work mixed --cores 1
    python -m tools.bench.generate --sizes 10m --batches 32 --prompt-len 512 --group-size 8 --no-torch  # as in GRPO

`equal`: as many prompts as the batch, all of one length, each continued by exactly --new-tokens tokens. `mixed`: four
times as many prompts, of 8 to --prompt-len tokens, and a set of end-of-text tokens that about one draw in 32 hits;
transformers takes them a batch at a time, padded to the longest, realjax refills its slots. Only tokens up to the end
of text count. Each library has a process of its own. Prints the best round of each: tokens per second of the clock and
per second of processor time; and for equal lengths the share of the memory's measured bandwidth at which the weights
and the cache that a token needs were read. On a busy machine use --cores 1 and the processor's seconds, by which that
share is then taken: threads that wait for each other spend processor time too.
"""

import argparse
import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from realjax.core.axes import generate_rules, tree_shardings
from realjax.core.compute import Compute
from realjax.core.generation_config import GenerationConfig
from realjax.core.layout import Layout, ParallelStrategy
from realjax.core.trees import num_params
from realjax.engine.batching import Request, generate
from realjax.engine.sampling import Sampler
from realjax.engine.slots import SlotPrograms
from realjax.hf.load import load_config, load_params
from realjax.models.build import build_model, init_params
from realjax.models.config import ModelConfig
from tools.bench.devices import start_devices
from tools.bench.sft import SHAPES, model_config

SAMPLING = {"greedy": {"greedy": True}, "sampled": {"greedy": False, "top_k": 200, "top_p": 0.9, "temperature": 1.0}}
CASES = [("equal", "greedy"), ("equal", "sampled"), ("mixed", "sampled")]
END_EVERY = 32  # in `mixed`, one token of the vocabulary in so many ends a text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What both libraries are given to do once."""

    batch: int
    prompts: list[np.ndarray]
    eos_ids: list[int]
    config: GenerationConfig


# run(job) -> tokens generated, up to each end of text
Run = Callable[[Job], int]


def main() -> None:
    args = parse_args()
    if args.cores:
        limit_cores(args.cores)
    bandwidth = stream_bandwidth(share_clock(args))
    print(f"device {jax.devices()[0]}, memory read at {bandwidth / 1e9:.1f} GB/s", flush=True)
    for size in args.sizes:
        compare(size, args, bandwidth)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["10m", "135m"], choices=list(SHAPES))
    parser.add_argument("--checkpoint", type=Path, help="a Hugging Face Llama whose weights and shape are used instead")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--work", nargs="+", default=["equal", "mixed"], choices=["equal", "mixed"])
    parser.add_argument("--sampling", nargs="+", default=list(SAMPLING), choices=list(SAMPLING))
    parser.add_argument("--prompt-len", type=int, default=64)
    parser.add_argument("--group-size", type=int, default=1, help="answers to each prompt, one after the other")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, help="use so many cores; default: all")
    parser.add_argument("--no-torch", action="store_true")
    return parser.parse_args()


def limit_cores(num_cores: int) -> None:
    """Confines this process to some of its cores; before a library starts its threads."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:num_cores])


def stream_bandwidth(clock: int) -> float:
    """Returns bytes/s, by one of `measure`'s clocks, of a sum over an array that no cache holds: the best of eight."""
    array, add = jnp.ones(2**27, jnp.float32), jax.jit(jnp.sum)
    add(array).block_until_ready()
    seconds = [measure(lambda: add(array).block_until_ready()) for _ in range(8)]
    return array.nbytes / min(took[clock] for took in seconds)


def share_clock(args: argparse.Namespace) -> int:
    """Returns which of `measure`'s clocks shares of the bandwidth are taken by."""
    return 1 if args.cores == 1 else 0


def measure(fn: Callable[[], object]) -> tuple[float, float]:
    """Returns the seconds of the clock and of the processor that a call took."""
    clock, processor = time.perf_counter(), time.process_time()
    fn()
    return time.perf_counter() - clock, time.process_time() - processor


def compare(size: str, args: argparse.Namespace, bandwidth: float) -> None:
    config = load_config(args.checkpoint) if args.checkpoint else model_config(size)
    workers = {name: Worker(name, size, args) for name in (["realjax"] if args.no_torch else list(MAKERS))}
    print(f"\n{size}: {num_params(build_model(config).abstract):,} parameters in {args.dtype}, prompts of up to "
          f"{args.prompt_len}, up to {args.new_tokens} new tokens", flush=True)  # fmt: skip
    print(f"{'batch':>5}  {'work':<15}{'':<14}{'tokens/s':>10}{'per CPU s':>11}{'bandwidth':>11}")
    for batch in args.batches:
        for work, sampling in CASES:
            if work not in args.work or sampling not in args.sampling:
                continue
            job = make_job(config.vocab_size, batch, work, sampling, args)
            rounds = [{name: worker.run(job) for name, worker in workers.items()} for _ in range(args.rounds + 1)][1:]
            best = {name: [max(r[name][i] for r in rounds) for i in range(2)] for name in workers}
            for name, (rate, cpu_rate) in best.items():
                needed = bytes_per_token(config, batch, args) * best[name][share_clock(args)] / bandwidth
                share = f"{needed:11.0%}" if work == "equal" else " " * 11
                ours = best["realjax"]
                ratio = "" if name == "realjax" else f"  realjax is x{ours[0] / rate:.2f}, x{ours[1] / cpu_rate:.2f}"
                print(f"{batch:5}  {work + ' ' + sampling:<15}{name:<14}{rate:10,.0f}{cpu_rate:11,.0f}{share}{ratio}",
                      flush=True)  # fmt: skip
    for worker in workers.values():
        worker.process.kill()


def make_job(vocab_size: int, batch: int, work: str, sampling: str, args: argparse.Namespace) -> Job:
    rng = np.random.default_rng(0)
    is_equal, longest, new = work == "equal", args.prompt_len, args.new_tokens
    num_prompts = -(-(batch if is_equal else 4 * batch) // args.group_size)
    lengths = [longest] * num_prompts if is_equal else rng.integers(min(8, longest), longest + 1, num_prompts)
    prompts = [rng.integers(0, vocab_size, n).astype(np.int32) for n in lengths]
    return Job(
        batch=batch,
        prompts=[prompt for prompt in prompts for _ in range(args.group_size)],
        eos_ids=[0] if is_equal else list(range(0, vocab_size, END_EVERY)),
        config=GenerationConfig(
            max_new_tokens=new, min_new_tokens=new if is_equal else 0, **SAMPLING[sampling]
        ),
    )  # fmt: skip


def bytes_per_token(config: ModelConfig, batch: int, args: argparse.Namespace) -> float:
    """Returns the bytes that a decoded token must read: its share of the weights, and its row's cache half grown."""
    itemsize = jnp.dtype(args.dtype).itemsize
    unread = 0 if config.tied else config.vocab_size * config.hidden_size  # of the embedding, only a row a token
    weights = num_params(build_model(config).abstract) - unread
    cached = 2 * config.num_layers * config.num_kv_heads * config.head_dim * (args.prompt_len + args.new_tokens / 2)
    return itemsize * (weights / batch + cached)


class Worker:
    """One library in a process of its own; `run` returns tokens per second, of the clock and of the processor."""

    def __init__(self, name: str, size: str, args: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(name, size, args, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def run(self, job: Job) -> tuple[float, float]:
        self.pipe.send(job)
        return self.pipe.recv()


def serve(name: str, size: str, args: argparse.Namespace, pipe: Connection) -> None:
    """Does each job it is sent and answers with its rates, for as long as it is left alive."""
    if args.cores:
        limit_cores(args.cores)
    run = MAKERS[name](size, args)
    while True:
        job, tokens = pipe.recv(), 0

        def go(job: Job = job) -> None:
            nonlocal tokens
            tokens = run(job)

        clock, processor = measure(go)
        pipe.send((tokens / clock, tokens / processor))


def make_realjax(size: str, args: argparse.Namespace) -> Run:
    start_devices()
    layout = Layout.of(ParallelStrategy())
    model = build_model(load_config(args.checkpoint) if args.checkpoint else model_config(size))
    shardings = tree_shardings(model.axes, model.abstract, generate_rules(layout.strategy), layout)
    dtype = jnp.dtype(args.dtype)
    if args.checkpoint:
        params = load_params(args.checkpoint, model, shardings, dtype=dtype)
    else:
        params = init_params(model, shardings, 0, dtype)
    options = Compute(dtype=args.dtype)
    programs: dict[tuple, SlotPrograms] = {}

    def run(job: Job) -> int:
        key = (job.batch, len(job.eos_ids), job.config)
        if key not in programs:
            sampler = Sampler(config=job.config, eos_ids=tuple(job.eos_ids), seed=0)
            programs[key] = SlotPrograms(model, layout, sampler, job.batch, options)
        requests = [Request(tokens=tokens, row_id=i) for i, tokens in enumerate(job.prompts)]
        return sum(len(generation.tokens) for generation in generate(programs[key], params, requests))

    return run


def make_transformers(size: str, args: argparse.Namespace) -> Run:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    dtype, device = getattr(torch, args.dtype), "cuda" if torch.cuda.is_available() else "cpu"
    if args.checkpoint:
        model: Any = LlamaForCausalLM.from_pretrained(args.checkpoint, dtype=dtype)
    else:
        D, L, N, K, H, F, V, tied = SHAPES[size]
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=N,
            num_key_value_heads=K, head_dim=H, tie_word_embeddings=tied, max_position_embeddings=8192,
        ))  # fmt: skip
    model = model.to(device, dtype).eval()

    def run(job: Job) -> int:
        batches = [job.prompts[i : i + job.batch] for i in range(0, len(job.prompts), job.batch)]
        return sum(run_batch(prompts, job) for prompts in batches)

    def run_batch(prompts: list[np.ndarray], job: Job) -> int:
        longest, config = max(map(len, prompts)), job.config
        ids = torch.tensor(np.stack([np.pad(p, (longest - len(p), 0)) for p in prompts]), device=device).long()
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        filters = {"top_k": config.top_k, "top_p": config.top_p, "temperature": config.temperature}
        limits = {"max_new_tokens": config.max_new_tokens, "min_new_tokens": config.min_new_tokens}
        ends = {"eos_token_id": job.eos_ids, "pad_token_id": job.eos_ids[0]}
        draws = {"do_sample": not config.greedy, **({} if config.greedy else filters)}
        with torch.no_grad():
            new = model.generate(ids, attention_mask=mask, **limits, **ends, **draws)[:, longest:].cpu().numpy()
        is_before_end = np.cumsum(np.isin(new, job.eos_ids), axis=1) - np.isin(new, job.eos_ids) == 0
        return int(is_before_end.sum())

    return run


MAKERS: dict[str, Callable[[str, argparse.Namespace], Run]] = {
    "realjax": make_realjax,
    "transformers": make_transformers,
}


if __name__ == "__main__":
    main()
