"""How algorithms learn on the demo's task: a tiny model writes film reviews, and is to praise.

    python -m tools.bench.curves --out DIR                      # every run
    python -m tools.bench.curves --out DIR grpo dapo --seeds 1 2 3
    python -m tools.bench.curves --out DIR grpo stale --steps 60  # answers drawn by parameters of one step before
    python -m tools.bench.curves --out DIR sft distill          # from a larger model to a smaller one

A fine-tuned model is made first, and a larger one as a teacher; what is in DIR already is not made again. Runs of
reinforcement learning take 32 prompts x 4 answers a step with the reward `realjax.apps.demo_data:praise_reward`.
Printed is the reward of held-out prompts, drawn answers, before the first step and after every ten, and the last step's
KL to the fine-tuned model. Runs of a smaller model print the loss of the data's held-out answers: `sft` learns their
tokens, `distill` the teacher's distributions at the same tokens, and `on_policy` those at its own answers, after `sft`.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from realjax.apps.demo_data import DemoFiles, write_demo_files
from realjax.dataflow.run import METRICS_FILE
from realjax.record.metrics import read_metrics

STEPS, EVERY = 30, 10
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 96, "head_dim": 8}
LARGE = {"hidden_size": 192, "num_hidden_layers": 3, "intermediate_size": 576, "head_dim": 48}
# Qwen3's form of a mixture of experts, of which a token goes through two; two devices share them.
MIXTURE = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 96,
    "head_dim": 24,
    "num_hidden_layers": 3,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
GRPO = ("group_size=4", "ppo.ppo_n_minibatches=2", "ppo.kl_ctl=0.02")
# The experiment of each run, the group of its algorithm's options, and its own options.
RUNS: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
    "ppo": ("ppo", "ppo", ("ppo.ppo_n_minibatches=2", "ppo.kl_ctl=0.02")),
    "grpo": ("grpo", "ppo", GRPO),
    "stale": ("grpo", "ppo", (*GRPO, "staleness=1")),
    "experts": (
        "grpo",
        "ppo",
        (*GRPO, "ppo.routing_replay=True", "n_gpus_per_node=2", "allocation_mode=d2e2p1m1"),
    ),
    "gspo": ("grpo", "ppo", (*GRPO, "ppo.surrogate=gspo", "ppo.loss_aggregation=sequence")),
    "cispo": ("grpo", "ppo", (*GRPO, "ppo.surrogate=cispo", "ppo.eps_clip=0.99", "ppo.eps_clip_high=2")),
    "dapo": (
        "grpo",
        "ppo",
        (
            *GRPO[:2],
            *("ppo.kl_ctl=0", "ppo.eps_clip_high=0.28", "ppo.drop_uniform_groups=True", "ppo.max_draws=8"),
            *("ppo.overlong_penalty=1", "ppo.overlong_buffer_len=8"),
        ),
    ),
    "rloo": ("rloo", "rloo", ("group_size=4", "rloo.ppo_n_minibatches=2", "rloo.kl_ctl=0.02")),
    "remax": ("remax", "remax", ("remax.ppo_n_minibatches=2", "remax.kl_ctl=0.02", "dataset.train_bs_n_seqs=64")),
    "reinforce_pp": (
        "reinforce_pp",
        "reinforce",
        ("group_size=4", "reinforce.ppo_n_minibatches=2", "reinforce.kl_ctl=0.02"),
    ),
}
SMALLER = ("sft", "distill", "on_policy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *RUNS, *SMALLER], default=[], help="runs; all by default")
    parser.add_argument("--out", type=Path, required=True, help="directory for all that is made")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=STEPS, help="of each run of reinforcement learning")
    args = parser.parse_args()
    bench = Bench(args.out.absolute(), args.seeds, args.steps)
    for name in args.names or (*RUNS, *SMALLER):
        print(bench.reinforce(name) if name in RUNS else bench.shrink(name), flush=True)


class Bench:
    """Runs beneath a directory, each made once."""

    def __init__(self, out: Path, seeds: Sequence[int], steps: int = STEPS) -> None:
        self.out, self.seeds, self.steps = out, seeds, steps
        made = DemoFiles(data=out / "data", model=out / "model")
        self.files = made if (made.model / "config.json").exists() else write_demo_files(out)

    def run(self, trial: str, experiment: str, *words: str) -> list[dict[str, float]]:
        """Returns the records of a run. Raises RuntimeError where it fails."""
        common = ("experiment_name=curves", f"trial_name={trial}", f"fileroot={self.out}", "mode=local")
        if not (logs := self.find(f"logs/*/curves/{trial}/report.html")):
            command = [experiment, *common, "n_gpus_per_node=1", "allocation_mode=d1p1m1", *words]
            # In a process of its own: one has the same devices for all its runs.
            code = subprocess.run([sys.executable, "-m", "realjax.apps.quickstart", *command]).returncode
            if code:
                raise RuntimeError(f"{trial}: exit code {code} of {' '.join(command)}")
            logs = self.find(f"logs/*/curves/{trial}/report.html")
        return read_metrics(logs[0].parent / METRICS_FILE)

    def find(self, pattern: str) -> list[Path]:
        """Returns what lies beneath the directory, sorted."""
        return sorted(self.out.glob(pattern))

    def fine_tune(self, trial: str, model: Path, *words: str) -> list[dict[str, float]]:
        """Returns the records of supervised fine-tuning of a model from scratch on the demo's reviews."""
        data = self.files.data
        return self.run(
            trial,
            "sft",
            *(f"model.path={model}", "model.init_from_scratch=True", "model.gradient_checkpointing=False"),
            *("model.optimizer.warmup_steps_proportion=0.1", "dataset.max_seqlen=48", "dataset.train_bs_n_seqs=64"),
            *(f"dataset.train_path={data / 'sft-train.jsonl'}", f"dataset.valid_path={data / 'sft-valid.jsonl'}"),
            *("model.optimizer.lr=0.005", "eval_freq_epochs=1", *words),
        )

    def checkpoint(self, trial: str, role: str = "default") -> Path:
        """Returns the last checkpoint of a run."""
        return self.find(f"checkpoints/*/curves/{trial}/{role}/epoch*")[-1]

    def reinforce(self, name: str) -> str:
        """Returns the line of a run of reinforcement learning at each seed."""
        is_mixture = name == "experts"
        trial, model = ("experts", self.resize("mixture", MIXTURE)) if is_mixture else ("start", self.files.model)
        self.fine_tune(trial, model, "total_train_epochs=2")
        start, (experiment, group, own) = self.checkpoint(trial), RUNS[name]
        data = self.files.data
        models = (
            {"actor": start, "ref": start} if not any(word.endswith("kl_ctl=0") for word in own) else {"actor": start}
        )
        words = [f"{role}.path={path}" for role, path in models.items()]
        if experiment == "ppo":
            words += [f"critic.path={start}", "critic.init_critic_from_actor=True", "critic.optimizer.lr=0.0005"]
            words += ["critic.optimizer.lr_scheduler_type=constant", "dataset.train_bs_n_seqs=128"]
        rows = []
        for seed in self.seeds:
            records = self.run(
                f"{name}-{seed}" if self.steps == STEPS else f"{name}-{seed}-{self.steps}",
                experiment,
                *("dataset.train_bs_n_seqs=32", *words, f"seed={seed}", "actor.gradient_checkpointing=False"),
                *("actor.optimizer.lr=0.0003", "actor.optimizer.lr_scheduler_type=constant"),
                *(f"dataset.path={data / 'prompt-train.jsonl'}", f"dataset.valid_path={data / 'prompt-valid.jsonl'}"),
                *("dataset.max_prompt_len=16", "reward.fn=realjax.apps.demo_data:praise_reward", "eval.greedy=False"),
                *(f"{group}.gen.max_new_tokens=32", f"{group}.gen.top_p=1", f"{group}.gen.top_k=1024", *own),
                *(f"benchmark_steps={self.steps}", f"eval_freq_steps={EVERY}"),
            )
            rewards = [record["sampled/task_reward"] for record in records if record["kind"] == "eval"]
            last = [record for record in records if record["kind"] == "train"][-1]
            drawn = [record["drawn_prompts"] for record in records if "drawn_prompts" in record]
            extra = f"; {statistics.mean(drawn):.0f} prompts drawn a step" if drawn else ""
            rows.append(
                f"| {name} | {seed} | {' -> '.join(f'{x:.2f}' for x in rewards)} | {last.get('kl', 0):.2f}{extra} |"
            )
        return "\n".join(rows)

    def shrink(self, name: str) -> str:
        """Returns the line of a smaller model's run at each seed."""
        large, small = self.resize("large", LARGE), self.resize("small", SMALL)
        self.fine_tune("teacher", large, "total_train_epochs=4", "model.optimizer.lr=0.003")
        data, rows = self.files.data, []
        for seed in self.seeds:
            trial = f"{name}-{seed}"
            if name == "sft":
                records = self.fine_tune(trial, small, f"seed={seed}", "total_train_epochs=2")
                losses = [record["loss"] for record in records if record["kind"] == "eval"]
            else:
                own = ["distill.divergence=forward_kl", "distill.data_share=1", f"actor.path={small}"]
                own += ["actor.init_from_scratch=True", "actor.optimizer.lr=0.005", "total_train_epochs=2"]
                own += ["actor.optimizer.warmup_steps_proportion=0.1"]
                if name == "on_policy":
                    self.fine_tune(f"sft-{seed}", small, f"seed={seed}", "total_train_epochs=2")
                    own = [f"actor.path={self.checkpoint(f'sft-{seed}')}", "actor.optimizer.lr=0.001"]
                records = self.run(
                    trial,
                    "distill",
                    *(
                        f"teacher.path={self.checkpoint('teacher')}",
                        f"seed={seed}",
                        "actor.gradient_checkpointing=False",
                    ),
                    *(f"dataset.path={data / 'sft-train.jsonl'}", f"dataset.valid_path={data / 'sft-valid.jsonl'}"),
                    *("dataset.max_prompt_len=24", "dataset.train_bs_n_seqs=64", "distill.gen.max_new_tokens=32"),
                    *("distill.gen.top_p=1", "distill.gen.top_k=1024", "distill.top_k=64", "eval_freq_epochs=1", *own),
                )
                losses = [record["nll"] for record in records if record["kind"] == "eval"]
            rows.append(f"| {name} | {seed} | {' -> '.join(f'{x:.4f}' for x in losses)} |")
        return "\n".join(rows)

    def resize(self, name: str, sizes: Mapping[str, int]) -> Path:
        """Returns a directory with the demo's tokenizer and a model's config of other sizes."""
        folder = self.out / name
        if not folder.exists():
            shutil.copytree(self.files.model, folder)
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | sizes))
        return folder


if __name__ == "__main__":
    main()
