"""Tokens/s of generation with and without proposals from a row's own text (`gen.prompt_lookup_num_tokens`).

    python -m tools.bench.lookup MODEL                              # copies of code alone
    python -m tools.bench.lookup MODEL --prompts prompts.jsonl      # and these prompts, as they are

MODEL is a checkpoint's folder. `copy`: functions of Python's own library, which the model is asked to repeat, in its
chat template. For each number of rows there are as many slots, and 8 prompts. Prints the best round of each: tokens per
second of the clock, prompts included, and the tokens that a row drew a round. Answers that differ in a token from those
without proposals are counted: by the last digits of the arithmetic a likeliest token can be another one.
"""

import argparse
import inspect
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from realjax.core.axes import generate_rules, tree_shardings
from realjax.core.compute import Compute
from realjax.core.generation_config import GenerationConfig
from realjax.core.layout import Layout, ParallelStrategy
from realjax.engine.batching import Batcher, Request
from realjax.engine.sampling import Sampler
from realjax.engine.slots import SlotPrograms
from realjax.hf.generation import load_eos_ids
from realjax.hf.load import load_config, load_params
from realjax.models.build import build_model
from tools.bench.devices import start_devices
from tools.bench.generate import SAMPLING, measure

NUM_PROMPTS = 8
FUNCTIONS = (textwrap.wrap, textwrap.fill, textwrap.shorten, textwrap.dedent, textwrap.indent)
FUNCTIONS = (*FUNCTIONS, inspect.getmodulename, inspect.cleandoc, inspect.getsourcelines)


def main() -> None:
    args = parse_args()
    start_devices()
    layout, model = Layout.of(ParallelStrategy()), build_model(load_config(args.model))
    shardings = tree_shardings(model.axes, model.abstract, generate_rules(layout.strategy), layout)
    compute = Compute(dtype=args.dtype)
    params = load_params(args.model, model, shardings, dtype=compute.array_dtype)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    eos_ids = load_eos_ids(args.model, tokenizer)
    print(
        f"{'work':<8}{'sampling':<10}{'rows':>5}{'proposed':>9}{'tokens':>8}{'tokens/s':>10}{'a round':>9}{'differ':>8}"
    )
    for work, prompts in make_prompts(tokenizer, args.prompts).items():
        requests = [Request(tokens=tokens, row_id=i) for i, tokens in enumerate(prompts)]
        for sampling in args.sampling:
            for rows in args.rows:
                plain, answers = 0.0, list[np.ndarray]()
                for num_proposed in args.proposed:
                    config = GenerationConfig(
                        max_new_tokens=args.new_tokens, prompt_lookup_num_tokens=num_proposed, **SAMPLING[sampling]
                    )
                    programs = SlotPrograms(
                        model, layout, Sampler(config=config, eos_ids=eos_ids, seed=0), rows, compute
                    )
                    tokens, rate, per_round = run(programs, params, requests, args.rounds)
                    if not num_proposed:
                        plain, answers = rate, tokens
                    num_other = sum(not np.array_equal(a, b) for a, b in zip(tokens, answers))
                    print(
                        f"{work:<8}{sampling:<10}{rows:5}{num_proposed:9}{sum(map(len, tokens)):8}{rate:10.1f}"
                        f"{per_round:9.2f}{num_other:8}"
                        + (f"   x{rate / plain:.2f}" if num_proposed and plain else ""),
                        flush=True,
                    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=Path, help="rows with a `prompt`, of which the first are taken")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument(
        "--proposed", type=int, nargs="+", default=[0, 4, 8], help="0 first: others are compared with it"
    )
    parser.add_argument("--sampling", nargs="+", default=list(SAMPLING), choices=list(SAMPLING))
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=2)
    return parser.parse_args()


def make_prompts(tokenizer: Any, path: Path | None) -> dict[str, list[np.ndarray]]:
    """Returns prompts `[L]` by what is asked for in them."""
    texts = [textwrap.dedent(inspect.getsource(function)) for function in FUNCTIONS[:NUM_PROMPTS]]
    asked = [f"Repeat this code, word for word:\n\n```python\n{text}```" for text in texts]
    opened = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
        for text in asked
    ]
    prompts = {"copy": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in opened]}
    if path is not None:
        lines = [json.loads(line)["prompt"] for line in path.read_text().splitlines()[:NUM_PROMPTS]]
        prompts["file"] = [tokenizer(line)["input_ids"] for line in lines]
    return {work: [np.array(tokens, np.int32) for tokens in found] for work, found in prompts.items()}


def run(
    programs: SlotPrograms, params: dict, requests: Sequence[Request], num_rounds: int
) -> tuple[list[np.ndarray], float, float]:
    """Returns the answers' tokens, the best rate of rounds after a first, and the tokens that a row drew a round."""
    prepared, rates = programs.prepare(params), list[float]()
    for _ in range(num_rounds + 1):
        batcher, answers = Batcher(programs, prepared), list[np.ndarray]()

        def answer(batcher: Batcher = batcher, answers: list[np.ndarray] = answers) -> None:
            answers += [one.tokens for one in batcher.answer(requests)]

        seconds, _ = measure(answer)
        rates.append(sum(map(len, answers)) / seconds)
    return answers, max(rates[-num_rounds:]), batcher.per_round.value if batcher.per_round.weight else 1.0


if __name__ == "__main__":
    main()
