"""DPO steps of realjax against TRL's DPOTrainer, alternating, on the same weights and pairs.

    python -m tools.bench.dpo                               # realjax alone
    PYTHONPATH=FOLDER python -m tools.bench.dpo             # against the TRL in FOLDER
    PYTHONPATH=FOLDER python -m tools.bench.dpo --lens 128 128

A folder with TRL, beside an environment that has realjax[dev], is made with

    pip install --target FOLDER --no-deps trl

TRL pads the sequences of a step to the longest; realjax packs them. What is printed is as in `tools.bench.ppo`.
"""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tools.bench import given, rounds
from tools.bench.given import ACTOR, MOST_STEPS, NUM_BATCHES

BETA = 0.1


def main() -> None:
    rounds.run("tools.bench.dpo", args := parse_args(), lambda folder: write_inputs(folder, args), WORKERS)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8, help="pairs in a step")
    parser.add_argument("--prompt-len", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--lens", type=int, nargs=2, default=(16, 160), help="shortest and longest answer")
    return rounds.add_arguments(parser).parse_args(argv)


def write_inputs(folder: Path, args: argparse.Namespace) -> float:
    """Writes models and pairs; returns the mean number of tokens in a step, end-of-texts counted."""
    given.write_models(folder)
    rng = np.random.default_rng(0)
    low, high = args.lens
    lengths = rng.integers(low, high + 1, (NUM_BATCHES * args.pairs, 2))
    draw = lambda n: " " + given.draw_text(rng, n)
    rows = [
        {"prompt": given.draw_text(rng, args.prompt_len), "pos_answers": [draw(good)], "neg_answers": [draw(bad)]}
        for good, bad in lengths
    ]
    given.write_rows(folder, rows)
    return 2 * args.pairs * (args.prompt_len + float(lengths.mean()) + 1)


def run_realjax(args: argparse.Namespace) -> None:
    """Takes the steps of `realjax dpo`."""
    given.run_realjax("dpo", options(args))


def options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the options of the run."""
    return {
        **given.common_options(args, {"actor": ACTOR, "ref": ACTOR}, trained=("actor",)),
        "dataset.train_path": args.inputs / given.ROWS,
        "dataset.max_seqlen": args.prompt_len + args.lens[1] + 1,
        "dataset.train_bs_n_seqs": args.pairs,
        "beta": BETA,
    }


def run_trl(args: argparse.Namespace) -> None:
    """Takes the steps of TRL's trainer, which stops in a callback between two rounds."""
    turns = rounds.Turns()
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trl: Any = importlib.import_module("trl")  # not installed as a rule
    steps = rounds.StepMarks(turns, f"TRL {trl.__version__}, torch with {torch.get_num_threads()} threads, padded rows")

    read = lambda: AutoModelForCausalLM.from_pretrained(args.inputs / ACTOR, dtype=torch.float32)
    texts = [(row["prompt"], row["pos_answers"][0], row["neg_answers"][0]) for row in given.read_rows(args.inputs)]
    pairs = [dict(zip(("prompt", "chosen", "rejected"), one)) for one in texts]
    trainer = trl.DPOTrainer(
        args=trl.DPOConfig(**trl_options(args), use_cpu=not torch.cuda.is_available()),
        processing_class=AutoTokenizer.from_pretrained(args.inputs / ACTOR, padding_side="left"),
        model=read(),
        ref_model=read(),
        train_dataset=Dataset.from_list(pairs),
        callbacks=[steps.callback()],
    )
    trainer.train()


def trl_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what `options` says in TRL's words."""
    return {
        **given.trl_options(args),
        "max_steps": MOST_STEPS,
        "per_device_train_batch_size": args.pairs,
        "max_length": args.prompt_len + args.lens[1] + 1,
        "beta": BETA,
    }


WORKERS = {rounds.OURS: run_realjax, rounds.THEIRS: run_trl}


if __name__ == "__main__":
    main()
