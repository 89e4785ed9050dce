"""GRPO steps of realjax against TRL's GRPOTrainer, alternating, on the same weights, prompts, lengths and groups.

    python -m tools.bench.grpo                               # realjax alone
    PYTHONPATH=FOLDER python -m tools.bench.grpo             # against the TRL in FOLDER
    PYTHONPATH=FOLDER python -m tools.bench.grpo --prompts 8 --group 4 --kl 0

A folder with TRL, beside an environment that has realjax[dev], is made with

    pip install --target FOLDER --no-deps trl

Models, answers and what is printed are as in `tools.bench.ppo`; the reward is the number of an answer's letters.
"""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.bench import given, rounds
from tools.bench.given import ACTOR, MOST_STEPS


def main() -> None:
    rounds.run("tools.bench.grpo", args := parse_args(), lambda folder: write_inputs(folder, args), WORKERS)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4, help="prompts in a step")
    parser.add_argument("--group", type=int, default=8, help="answers to each prompt")
    parser.add_argument("--prompt-lens", type=int, nargs=2, default=(64, 64), help="shortest and longest prompt")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens of every answer")
    parser.add_argument("--kl", type=float, default=0.04, help="weight of the KL to the reference; 0: no reference")
    return rounds.add_arguments(parser).parse_args(argv)


def write_inputs(folder: Path, args: argparse.Namespace) -> float:
    """Writes models and prompts; returns the mean number of tokens in a step, those of prompts once an answer."""
    given.write_models(folder)
    prompt_len = given.write_prompts(folder, args.prompts, args.prompt_lens)
    return args.prompts * args.group * (prompt_len + args.new_tokens)


def count_letters(prompts: Sequence[str], answers: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
    return [len(answer) / 100 for answer in answers]


def run_realjax(args: argparse.Namespace) -> None:
    """Takes the steps of `realjax grpo`."""
    given.run_realjax("grpo", options(args))


def options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the options of the run."""
    models = {"actor": ACTOR, "ref": ACTOR} if args.kl else {"actor": ACTOR}
    return {
        **given.common_options(args, models, trained=("actor",)),
        "dataset.path": args.inputs / given.ROWS,
        "dataset.max_prompt_len": args.prompt_lens[1],
        "dataset.train_bs_n_seqs": args.prompts,
        "group_size": args.group,
        "reward.fn": "tools.bench.grpo:count_letters",
        **given.exact_answers("ppo", args.new_tokens),
        "ppo.ppo_n_minibatches": 1,
        "ppo.kl_ctl": args.kl,
    }


def run_trl(args: argparse.Namespace) -> None:
    """Takes the steps of TRL's trainer, which stops in a callback between two rounds."""
    turns = rounds.Turns()
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trl: Any = importlib.import_module("trl")  # not installed as a rule
    steps = rounds.StepMarks(turns, f"TRL {trl.__version__}, torch with {torch.get_num_threads()} threads")

    class Trainer(trl.GRPOTrainer):
        def _generate(self, *inputs: Any, **options: Any) -> Any:
            result = super()._generate(*inputs, **options)
            steps.mark("generation")
            return result

        def _prepare_inputs(self, *inputs: Any, **options: Any) -> Any:
            result = super()._prepare_inputs(*inputs, **options)
            steps.mark("scoring")
            return result

    rows = given.read_rows(args.inputs)
    trainer = Trainer(
        args=trl.GRPOConfig(**trl_options(args), use_cpu=not torch.cuda.is_available()),
        processing_class=AutoTokenizer.from_pretrained(args.inputs / ACTOR, padding_side="left"),
        model=AutoModelForCausalLM.from_pretrained(args.inputs / ACTOR, dtype=torch.float32),
        reward_funcs=lambda completions, **_: count_letters([], completions, []),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        callbacks=[steps.callback()],
    )
    trainer.train()


def trl_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what `options` says in TRL's words."""
    return {
        **given.trl_options(args),
        "max_steps": MOST_STEPS,
        "per_device_train_batch_size": args.prompts * args.group,
        "num_generations": args.group,
        "max_completion_length": args.new_tokens,
        "generation_kwargs": {"min_new_tokens": args.new_tokens},
        "temperature": 1.0,
        "beta": args.kl,
    }


WORKERS = {rounds.OURS: run_realjax, rounds.THEIRS: run_trl}


if __name__ == "__main__":
    main()
