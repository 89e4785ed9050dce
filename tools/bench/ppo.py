"""PPO steps of realjax against TRL's PPOTrainer, alternating, on the same weights, prompts, lengths and minibatches.

    python -m tools.bench.ppo                               # realjax alone
    PYTHONPATH=FOLDER python -m tools.bench.ppo             # against the TRL in FOLDER
    PYTHONPATH=FOLDER python -m tools.bench.ppo --prompt-lens 16 112 --minibatches 4 --epochs 2

A folder with the last TRL that has PPO, beside an environment that has realjax[dev], is made with

    pip install --target FOLDER --no-deps trl==1.12.0 requests urllib3 idna charset_normalizer certifi

Actor, reference, critic and reward model are Llamas of 8.6 million parameters in float32. Every answer has --new-tokens
tokens, drawn from the whole vocabulary, so both do the same work. Each has its own process, so that no library's
threads disturb the other's. Prints seconds a step and by call, and tokens/s (prompts and answers), medians over the
rounds; seconds of the process on all cores, which say more than the clock on a busy machine; and the most memory that
the process had.
"""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.bench import given, rounds
from tools.bench.given import ACTOR, CRITIC, MOST_STEPS

KL, LAMBDA = 0.05, 0.95
MODELS = {"actor": ACTOR, "ref": ACTOR, "critic": CRITIC, "rew": CRITIC}


def main() -> None:
    rounds.run("tools.bench.ppo", args := parse_args(), lambda folder: write_inputs(folder, args), WORKERS)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16, help="prompts in a step")
    parser.add_argument("--prompt-lens", type=int, nargs=2, default=(64, 64), help="shortest and longest prompt")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens of every answer")
    parser.add_argument("--epochs", type=int, default=1, help="passes over the answers of a step")
    parser.add_argument("--minibatches", type=int, default=1, help="updates in a pass")
    return rounds.add_arguments(parser).parse_args(argv)


def write_inputs(folder: Path, args: argparse.Namespace) -> float:
    """Writes models and prompts; returns the mean number of tokens in a step, answers counted."""
    given.write_models(folder)
    return args.batch * (given.write_prompts(folder, args.batch, args.prompt_lens) + args.new_tokens)


def run_realjax(args: argparse.Namespace) -> None:
    """Takes the steps of `realjax ppo`."""
    given.run_realjax("ppo", options(args))


def options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the options of the run."""
    return {
        **given.common_options(args, MODELS, trained=("actor", "critic")),
        "dataset.path": args.inputs / given.ROWS,
        "dataset.max_prompt_len": args.prompt_lens[1],
        "dataset.train_bs_n_seqs": args.batch,
        **given.exact_answers("ppo", args.new_tokens),
        "ppo.ppo_epochs": args.epochs,
        "ppo.ppo_n_minibatches": args.minibatches,
        "ppo.kl_ctl": KL,
        "ppo.gae_lambda": LAMBDA,
        "ppo.value_norm": False,
    }


def run_trl(args: argparse.Namespace) -> None:
    """Takes the steps of TRL's trainer, which stops in a callback between two rounds."""
    turns = rounds.Turns()
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    trl: Any = importlib.import_module("trl.experimental.ppo.ppo_trainer")  # not installed as a rule
    steps = rounds.StepMarks(turns, f"torch with {torch.get_num_threads()} threads, rows padded to the longest prompt")

    def generate(*inputs: Any) -> Any:
        result = batch_generation(*inputs)
        steps.mark("generation")
        return result

    batch_generation, trl.batch_generation = trl.batch_generation, generate
    read = lambda cls, name: cls.from_pretrained(args.inputs / name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.inputs / ACTOR, padding_side="left")
    trainer = trl.PPOTrainer(
        args=trl.PPOConfig(**trl_options(args), use_cpu=not torch.cuda.is_available()),
        processing_class=tokenizer,
        model=read(AutoModelForCausalLM, ACTOR),
        ref_model=read(AutoModelForCausalLM, ACTOR),
        reward_model=read(AutoModelForSequenceClassification, CRITIC),
        value_model=read(AutoModelForSequenceClassification, CRITIC),
        train_dataset=[{"input_ids": tokenizer(row["prompt"])["input_ids"]} for row in given.read_rows(args.inputs)],
        callbacks=[steps.callback()],
    )
    # Only training calls actor and critic as one module.
    trainer.model.register_forward_pre_hook(lambda *_: steps.mark("scoring"))
    trainer.train()


def trl_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what `options` says in TRL's words."""
    return {
        **given.trl_options(args),
        "total_episodes": MOST_STEPS * args.batch,
        # A minibatch is one forward and backward pass.
        "per_device_train_batch_size": args.batch,
        "num_mini_batches": args.minibatches,
        "num_ppo_epochs": args.epochs,
        "local_rollout_forward_batch_size": args.batch,
        "response_length": args.new_tokens,
        "temperature": 1.0,
        "kl_coef": KL,
        "lam": LAMBDA,
        "num_sample_generations": 0,
    }


WORKERS = {rounds.OURS: run_realjax, rounds.THEIRS: run_trl}


if __name__ == "__main__":
    main()
