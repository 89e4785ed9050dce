"""The fewest GPUs that a model is trained on, by the planner's memory model, as a table.

    python -m tools.bench.fits [--models qwen2.5-0.5b llama3-8b] [--gpus h100 h200]

Rows of 2,048 tokens, 64 of them in a step; in reinforcement learning 256 answers of up to 1,024 tokens to prompts of
256. How calls are split, micro-batches, ZeRO and what is computed again are left to the search. Nothing is run, and no
weights are read. The search looks at few plans, so a rare one of fewer GPUs may be missed.
"""

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from realjax.allocation.cluster import Cluster, find_cluster
from realjax.allocation.cluster_costs import ClusterCosts
from realjax.allocation.memory import DoesNotFitError
from realjax.allocation.points.known_models import find_model
from realjax.allocation.run_workload import read_workload
from realjax.allocation.search import Limits, search
from realjax.apps import quickstart
from realjax.apps.demo_data import MODEL, write_model
from realjax.apps.plan import build_spec
from realjax.hf.families import config_to_hf
from realjax.options.common import CommonExperimentConfig
from realjax.options.parsing import parse_overrides

MODELS = ("qwen2.5-0.5b", "qwen2.5-1.5b", "llama3-3b", "llama3-8b", "qwen2.5-14b", "qwen2.5-32b", "llama3-70b")
GPUS = ("h100", "h200", "b200")
MOST_GPUS, PLANS = 256, 200
# What is run: the options that name its models, and others.
RUNS: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "sft": (("model",), ()),
    "dpo": (("actor", "ref"), ()),
    "ppo": (("actor", "ref", "critic", "rew"), ("critic.init_critic_from_actor=True",)),
    "grpo": (("actor", "ref"), ("reward.fn=realjax.apps.demo_data:praise_reward", "group_size=4")),
}


def write_config(directory: Path, name: str) -> None:
    """Writes the config.json of a model by name, in a Llama's layout, and a small tokenizer."""
    shape = find_model(name)
    write_model(directory, ["a text"])
    sizes = ("hidden_size", "num_layers", "num_q_heads", "num_kv_heads", "head_dim", "ffn_size", "vocab_size")
    config = dataclasses.replace(
        MODEL, **{size: getattr(shape, size) for size in sizes}, max_positions=4096, tied=shape.is_tied
    )
    ids = {"pad_token_id": 0, "eos_token_id": 1}
    (directory / "config.json").write_text(json.dumps({**config_to_hf(config), **ids}))


def write_data(folder: Path) -> dict[str, list[str]]:
    """Writes data of the lengths that the table is for, and returns the options of each experiment that name them."""
    text = "a" * 8192  # a token a byte: more than is kept
    rows = {
        "sft": [{"prompt": "b", "answer": text}] * 64,
        "dpo": [{"prompt": "b", "chosen": text, "rejected": f"c{text}"}] * 64,
        "rl": [{"prompt": text}] * 256,
    }
    for kind, found in rows.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    answers = ["dataset.max_prompt_len=256", "ppo.max_new_tokens=1024", f"dataset.path={folder}/rl.jsonl"]
    rows_of = lambda kind, size: [
        f"dataset.train_path={folder}/{kind}.jsonl",
        "dataset.max_seqlen=2048",
        f"dataset.train_bs_n_seqs={size}",
    ]
    return {
        "sft": rows_of("sft", 64),
        "dpo": rows_of("dpo", 64),
        "ppo": [*answers, "dataset.train_bs_n_seqs=256"],
        "grpo": [*answers, "dataset.train_bs_n_seqs=64"],
    }


def find_fewest(experiment: str, words: Sequence[str], gpu: str, at_least: int) -> int:
    """Returns how many GPUs the run needs, a power of two from `at_least` on; above MOST_GPUS where none will do."""
    config = parse_overrides(quickstart.find_experiment(experiment).config_cls, list(words))
    num_gpus = at_least
    while num_gpus <= MOST_GPUS and not fits(experiment, config, find_cluster(f"{gpu}x{num_gpus}")):
        num_gpus *= 2
    return num_gpus


def fits(experiment: str, config: CommonExperimentConfig, cluster: Cluster) -> bool:
    """Returns whether there is a plan that the memory model finds room for."""
    machine = {"n_nodes": cluster.num_nodes, "n_gpus_per_node": cluster.devices_per_node}
    spec = build_spec(experiment, dataclasses.replace(config, allocation_mode="search", **machine))
    try:
        search(read_workload(spec, cluster.platform), cluster, ClusterCosts(cluster=cluster), Limits(most_plans=PLANS))
    except DoesNotFitError:
        return False
    return True


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--gpus", nargs="+", default=GPUS)
    args = parser.parse_args()
    print("| model | run | " + " | ".join(args.gpus) + " |\n|---|---|" + "---|" * len(args.gpus))
    fewest: dict[tuple[str, str], int] = {}  # a larger model needs no fewer
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder))
        for name in args.models:
            directory = Path(folder) / name
            directory.mkdir()
            write_config(directory, name)
            for run, (roles, more) in RUNS.items():
                words = [f"{role}.path={directory}" for role in roles] + data[run] + list(more)
                for gpu in args.gpus:
                    words_here = [*words, f"fileroot={folder}/runs"]
                    fewest[run, gpu] = find_fewest(run, words_here, gpu, fewest.get((run, gpu), 1))
                cells = [str(n) if (n := fewest[run, gpu]) <= MOST_GPUS else f"> {MOST_GPUS}" for gpu in args.gpus]
                print(f"| {name} | {run} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
