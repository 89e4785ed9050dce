"""What the benches beside TRL are given: small Llamas with a tokenizer of one token a word, and realjax's side."""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from realjax.allocation.allocate import allocate
from realjax.apps.quickstart import EXPERIMENTS
from realjax.core.axes import inference_rules, tree_shardings
from realjax.core.layout import Layout, ParallelStrategy
from realjax.data.loader import Loader
from realjax.hf.families import config_to_hf
from realjax.hf.save import save_hf
from realjax.models.build import build_model, init_params
from realjax.models.config import ModelConfig
from realjax.options.checks import resolve_names, validate
from realjax.options.parsing import parse_overrides
from realjax.runtime.executor import Executor
from realjax.runtime.roles import build_roles, load_role
from tools.bench.devices import start_devices
from tools.bench.rounds import NUM_WARM, Turns

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
ACTOR, CRITIC, ROWS = "actor", "critic", "rows.jsonl"
NUM_BATCHES = 4  # of rows, used again and again
MOST_STEPS = 1000
LR = 1e-5


def write_models(folder: Path) -> None:
    """Writes a language model and a model with a scalar head, both with a tokenizer of one token a word."""
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


def draw_text(rng: np.random.Generator, num_words: int) -> str:
    return " ".join(rng.choice(WORDS[2:], num_words))


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / ROWS).write_text("".join(json.dumps({"id": i, **row}) + "\n" for i, row in enumerate(rows)))


def write_prompts(folder: Path, num_prompts: int, lengths: tuple[int, int]) -> float:
    """Writes `NUM_BATCHES` batches of prompts of these shortest and longest lengths; returns their mean length."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(lengths[0], lengths[1] + 1, NUM_BATCHES * num_prompts)
    write_rows(folder, [{"prompt": draw_text(rng, n)} for n in drawn])
    return float(drawn.mean())


def read_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / ROWS).read_text().splitlines()]


def common_options(args: argparse.Namespace, roles: dict[str, str], trained: tuple[str, ...]) -> dict[str, Any]:
    """Returns what all commands say: devices, `roles` by the model each reads, a constant learning rate."""
    values = {"fileroot": args.inputs / "runs", "mode": "local", "n_gpus_per_node": args.devices}
    values |= {"allocation_mode": args.plan} if args.plan else {}
    values |= {f"{role}.path": args.inputs / name for role, name in roles.items()}
    schedule = {"lr": LR, "lr_scheduler_type": "constant", "warmup_steps_proportion": 0.0}
    for role in trained:
        values |= {f"{role}.optimizer.{name}": value for name, value in schedule.items()}
        values |= {f"{role}.gradient_checkpointing": False}
    return values | {"total_train_epochs": MOST_STEPS // NUM_BATCHES}


def exact_answers(prefix: str, num_tokens: int) -> dict[str, Any]:
    """Returns the options of answers that all have `num_tokens` tokens, drawn from the whole vocabulary."""
    gen = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "top_p": 1.0, "top_k": MODEL.vocab_size}
    return {f"{prefix}.gen.{name}": value for name, value in gen.items()}


def trl_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what `common_options` says in the words of TRL's trainers, and that they leave nothing."""
    return {
        "output_dir": str(args.inputs / "trl"),
        "gradient_accumulation_steps": 1,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def run_realjax(experiment: str, values: dict[str, Any]) -> None:
    """Takes the steps of `realjax <experiment>` with these options."""
    turns = Turns()
    start_devices(values["n_gpus_per_node"])
    loader, executor = make_executor(experiment, values)
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
            turns.begin(f"{len(compiled.entries)} programs compiled in {compiled.seconds:.0f} s, trained on {rows}")


def make_executor(experiment: str, values: dict[str, Any]) -> tuple[Loader, Executor]:
    """Returns the loader and the executor of the command."""
    entry = EXPERIMENTS[experiment]
    words = [f"{name}={value}" for name, value in values.items()]
    config = resolve_names(parse_overrides(entry.config_cls, words), experiment)
    validate(config)
    spec = entry.build(config)
    plan = allocate(spec, jax.devices()[: values["n_gpus_per_node"]])
    roles = build_roles(spec, plan)
    states = {name: load_role(role, spec.seed) for name, role in roles.items()}
    return plan.loader, Executor(spec, plan, roles, states)
