"""PPO steps of realjax against TRL's PPOTrainer, alternating, on the same weights, prompts, lengths and minibatches.

    python -m tools.bench.ppo                               # realjax alone
    PYTHONPATH=FOLDER python -m tools.bench.ppo             # against the TRL in FOLDER
    PYTHONPATH=FOLDER python -m tools.bench.ppo --prompt-lens 16 112 --minibatches 4 --epochs 2

A folder with TRL, beside an environment that has realjax[torch], is made with

    pip install --target FOLDER --no-deps trl==1.12.0 accelerate psutil datasets pyarrow pandas xxhash \\
        "dill<0.4.2" "multiprocess<0.70.20"

Actor, reference, critic and reward model are Llamas of 8.6 million parameters in float32. Every answer has --new-tokens
tokens, drawn from the whole vocabulary, so both do the same work. Each has its own process, so that no library's
threads disturb the other's. Prints seconds a step and by call, and tokens/s (prompts and answers), medians over the
rounds; and seconds of the process on all cores, which say more than the clock on a busy machine.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from realjax.allocation.allocate import allocate
from realjax.core.axes import inference_rules, tree_shardings
from realjax.core.layout import Layout, ParallelStrategy
from realjax.core.malloc import keep_freed_memory
from realjax.data.loader import Loader
from realjax.experiments import ppo
from realjax.hf.families import config_to_hf
from realjax.hf.save import save_hf
from realjax.models.build import build_model, init_params
from realjax.models.config import ModelConfig
from realjax.options.checks import resolve_names, validate
from realjax.options.parsing import parse_overrides
from realjax.options.rl import PPOConfig
from realjax.runtime.executor import Executor
from realjax.runtime.roles import build_roles, load_role
from tools.bench.workers import start_workers

MODEL = ModelConfig(
    family="llama",
    vocab_size=8192,
    hidden_size=256,
    num_layers=6,
    num_q_heads=8,
    num_kv_heads=4,
    head_dim=32,
    ffn_size=704,
    max_positions=2048,
)
WORDS = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, MODEL.vocab_size))]
ACTOR, CRITIC, PROMPTS = "actor", "critic", "prompts.jsonl"
NUM_BATCHES = 4  # of prompts, used again and again
NUM_WARM = 2  # steps before any is timed; those that compile do not count
MOST_STEPS = 1000
LR, KL, LAMBDA = 1e-5, 0.05, 0.95
OURS, THEIRS = "realjax", "TRL"
NEEDED = ("trl", "torch", "accelerate", "datasets")

Seconds = dict[str, float]  # of each call, of the whole "step", and of all cores as "cpu"


def main() -> None:
    args = parse_args()
    if args.worker:
        WORKERS[args.worker](args)
        return
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"not compared with TRL, no module {', '.join(missing)}: --help says how to get them", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        tokens = write_inputs(Path(folder), args)
        compare([OURS] if missing else [OURS, THEIRS], folder, args, tokens)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16, help="prompts in a step")
    parser.add_argument("--prompt-lens", type=int, nargs=2, default=(64, 64), help="shortest and longest prompt")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens of every answer")
    parser.add_argument("--epochs", type=int, default=1, help="passes over the answers of a step")
    parser.add_argument("--minibatches", type=int, default=1, help="updates in a pass")
    parser.add_argument("--steps", type=int, default=3, help="steps of each in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", choices=[OURS, THEIRS], help=argparse.SUPPRESS)
    parser.add_argument("--inputs", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(names: list[str], folder: str, args: argparse.Namespace, tokens: float) -> None:
    """Prints a line for each of `names`, and their ratio; a step has `tokens` tokens."""
    rounds: dict[str, list[Seconds]] = {name: [] for name in names}
    with start_workers("tools.bench.ppo", names, "--inputs", folder) as workers:
        for name, worker in workers.items():
            print(f"{name}: {worker.read()}", flush=True)
        for _ in range(args.rounds):
            for name, worker in workers.items():
                rounds[name].append(worker.run(args.steps))
    medians = {
        name: {call: statistics.median(one.get(call, 0.0) for one in found) / args.steps for call in found[0]}
        for name, found in rounds.items()
    }
    for name, seconds in medians.items():
        total, cpu = seconds.pop("step"), seconds.pop("cpu")
        calls = ", ".join(f"{call} {value:.2f}" for call, value in seconds.items())
        print(f"  {name:<8}{total:6.2f} s a step, {tokens / total:6,.0f} tokens/s, {cpu:.2f} s of all cores; {calls}")
    if len(names) == 2:
        ratios = [theirs["step"] / ours["step"] for ours, theirs in zip(rounds[OURS], rounds[THEIRS])]
        print(f"  realjax is x{statistics.median(ratios):.2f} (x{min(ratios):.2f} to x{max(ratios):.2f} by round)")


class Turns:
    """A worker's side: lets its loop take as many steps as it is told, and answers with their seconds."""

    def __init__(self) -> None:
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print must not mix with the answers
        self.num_asked = 0
        self._start_round()

    def begin(self, note: str) -> None:
        """Describes the loop once it is warm, and waits."""
        self._answer(note)

    def end_step(self, calls: Seconds, *, is_warm: bool = True) -> None:
        """Counts a step, and waits where it was the last of its round; one that is not warm starts the round anew."""
        if not is_warm:
            self._start_round()
            return
        self.num_left -= 1
        self.calls.update(calls)
        if self.num_left == 0:
            seconds = time.perf_counter() - self.start
            cpu = time.process_time() - self.cpu
            self._answer({"step": seconds, "cpu": cpu, **self.calls, "rest": seconds - self.calls.total()})

    def _answer(self, value: Any) -> None:
        print(json.dumps(value), file=self.answers, flush=True)
        self.num_asked = int(sys.stdin.readline() or sys.exit())
        self._start_round()

    def _start_round(self) -> None:
        self.num_left, self.calls = self.num_asked, Counter()
        self.start, self.cpu = time.perf_counter(), time.process_time()


def write_inputs(folder: Path, args: argparse.Namespace) -> float:
    """Writes a language model, a model with a scalar head, both with a tokenizer of one token a word, and prompts.

    Returns the mean number of tokens in a step, answers counted.
    """
    source = folder / "source"
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=WORDS[0], eos_token=WORDS[1], padding_side="left"
    )
    fast.save_pretrained(source)
    text = json.dumps({**config_to_hf(MODEL), "pad_token_id": 0, "eos_token_id": 1})
    (source / "config.json").write_text(text)
    layout = Layout.of(ParallelStrategy())
    for name, config in {ACTOR: MODEL, CRITIC: MODEL.as_critic()}.items():
        model = build_model(config)
        shardings = tree_shardings(model.axes, model.abstract, inference_rules(layout.strategy), layout)
        save_hf(init_params(model, shardings, 0), config, folder / name, source_dir=source, dtype="float32")
    rng = np.random.default_rng(0)
    low, high = args.prompt_lens
    lengths = rng.integers(low, high + 1, NUM_BATCHES * args.batch)
    rows = [{"id": i, "prompt": " ".join(rng.choice(WORDS[2:], n))} for i, n in enumerate(lengths)]
    (folder / PROMPTS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return args.batch * (float(lengths.mean()) + args.new_tokens)


def run_realjax(args: argparse.Namespace) -> None:
    """Takes the steps of `realjax ppo` on one device."""
    turns = Turns()
    if jax.default_backend() == "cpu":
        keep_freed_memory()  # as `realjax ppo` does
    loader, executor = make_executor(args)
    compiled = executor.compile_log
    num_warm = 0
    for step in range(loader.total_steps):
        num_compiled = len(compiled.entries)
        result = executor.step(loader.batch(step), step)
        jax.block_until_ready((executor.states, result.metrics))
        calls = {record.name: record.end - record.start for record in executor.timeline.of_step(step)}
        if num_warm == NUM_WARM:
            turns.end_step(calls, is_warm=len(compiled.entries) == num_compiled)
            continue
        num_warm = num_warm + 1 if len(compiled.entries) == num_compiled else 0
        if num_warm == NUM_WARM:
            rows = f"{result.batch.num_rows} rows x {result.batch.row_len}"
            turns.begin(f"{len(compiled.entries)} programs compiled in {compiled.seconds:.0f} s, answers in {rows}")


def make_executor(args: argparse.Namespace) -> tuple[Loader, Executor]:
    """Returns the prompts and the executor of `realjax ppo` with these options."""
    config = resolve_names(parse_overrides(PPOConfig, options(args)), "ppo")
    validate(config)
    spec = ppo.build(config)
    plan = allocate(spec, jax.devices()[:1])
    roles = build_roles(spec, plan)
    states = {name: load_role(role, spec.seed) for name, role in roles.items()}
    return plan.loader, Executor(spec, plan, roles, states)


def options(args: argparse.Namespace) -> list[str]:
    """Returns the command line of the run, after `realjax ppo`."""
    roles = ("actor", "ref", "critic", "rew")
    of_roles = {f"{role}.path": args.inputs / (ACTOR if role in ("actor", "ref") else CRITIC) for role in roles}
    of_roles |= {f"{role}.gradient_checkpointing": False for role in ("actor", "critic")}
    of_roles |= {
        f"{role}.optimizer.{name}": value
        for role in ("actor", "critic")
        for name, value in {"lr": LR, "lr_scheduler_type": "constant", "warmup_steps_proportion": 0.0}.items()
    }
    values = {
        "fileroot": args.inputs / "runs",
        "mode": "local",
        "allocation_mode": "manual",
        "n_gpus_per_node": 1,
        **of_roles,
        "dataset.path": args.inputs / PROMPTS,
        "dataset.max_prompt_len": args.prompt_lens[1],
        "dataset.train_bs_n_seqs": args.batch,
        "total_train_epochs": MOST_STEPS // NUM_BATCHES,
        "ppo.gen.max_new_tokens": args.new_tokens,
        "ppo.gen.min_new_tokens": args.new_tokens,
        "ppo.gen.top_p": 1.0,
        "ppo.gen.top_k": MODEL.vocab_size,
        "ppo.ppo_epochs": args.epochs,
        "ppo.ppo_n_minibatches": args.minibatches,
        "ppo.kl_ctl": KL,
        "ppo.gae_lambda": LAMBDA,
        "ppo.value_norm": False,
    }
    return [f"{name}={value}" for name, value in values.items()]


def run_trl(args: argparse.Namespace) -> None:
    """Takes the steps of TRL's trainer, which stops in a callback between two rounds."""
    turns = Turns()
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

    trl: Any = importlib.import_module("trl.experimental.ppo.ppo_trainer")  # not installed as a rule
    marks: list[float] = []  # of a step: generation begins, generation ends, training begins

    class Steps(TrainerCallback):
        num_done = 0

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.num_done += 1
            start, generated, scored = marks[:3]
            calls = {"generation": generated - start, "scoring": scored - generated}
            calls["training"] = time.perf_counter() - scored
            if self.num_done > NUM_WARM:
                turns.end_step(calls)
            elif self.num_done == NUM_WARM:
                turns.begin(f"torch with {torch.get_num_threads()} threads, rows padded to the longest prompt")

    def generate(*inputs: Any) -> Any:
        marks[:] = [time.perf_counter()]
        result = batch_generation(*inputs)
        marks.append(time.perf_counter())
        return result

    batch_generation, trl.batch_generation = trl.batch_generation, generate
    read = lambda cls, name: cls.from_pretrained(args.inputs / name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.inputs / ACTOR, padding_side="left")
    rows = map(json.loads, (args.inputs / PROMPTS).read_text().splitlines())
    trainer = trl.PPOTrainer(
        args=trl.PPOConfig(**trl_options(args), use_cpu=not torch.cuda.is_available()),
        processing_class=tokenizer,
        model=read(AutoModelForCausalLM, ACTOR),
        ref_model=read(AutoModelForCausalLM, ACTOR),
        reward_model=read(AutoModelForSequenceClassification, CRITIC),
        value_model=read(AutoModelForSequenceClassification, CRITIC),
        train_dataset=[{"input_ids": tokenizer(row["prompt"])["input_ids"]} for row in rows],
        callbacks=[Steps()],
    )
    # Only training calls actor and critic as one module.
    trainer.model.register_forward_pre_hook(lambda *_: marks.append(time.perf_counter()))
    trainer.train()


def trl_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what `options` says in TRL's words."""
    return {
        "output_dir": str(args.inputs / "trl"),
        "total_episodes": MOST_STEPS * args.batch,
        # A minibatch is one forward and backward pass.
        "per_device_train_batch_size": args.batch,
        "gradient_accumulation_steps": 1,
        "num_mini_batches": args.minibatches,
        "num_ppo_epochs": args.epochs,
        "local_rollout_forward_batch_size": args.batch,
        "response_length": args.new_tokens,
        "temperature": 1.0,
        "kl_coef": KL,
        "lam": LAMBDA,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "num_sample_generations": 0,
        "disable_tqdm": True,
    }


WORKERS: dict[str, Callable[[argparse.Namespace], None]] = {OURS: run_realjax, THEIRS: run_trl}


if __name__ == "__main__":
    main()
