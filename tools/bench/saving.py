"""What saving takes of a training step: in the background, as runs save, and waited for at once.

    python -m tools.bench.saving                            # a model of 31 million parameters
    python -m tools.bench.saving --hidden 1024 --every 5

The same SFT run on one device, of a Llama from random weights, three times over in one process, alternating: without
saves; with a checkpoint and a training state after every --every steps, as runs write them; and the same with each step
waiting until both are on the disk. Prints, of each, the mean seconds of a step with all that it waited for, and the
share of them that is saving's; and the size of what is written. On a machine whose cores compute the steps, the writers
take some of them.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import jax
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from realjax.apps import quickstart
from realjax.core.axes import inference_rules, tree_shardings
from realjax.core.layout import Layout, ParallelStrategy
from realjax.data.loader import Position
from realjax.hf.families import config_to_hf
from realjax.hf.save import save_hf
from realjax.models.build import build_model, init_params
from realjax.models.config import ModelConfig
from realjax.record.metrics import read_metrics
from realjax.runtime.session import Session, Taken

VOCAB = 8192
NUM_WARM = 3  # steps that do not count: the first ones compile
KINDS = ("none", "background", "waited for")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=23)
    parser.add_argument("--every", type=int, default=5, help="steps between saves")
    parser.add_argument("--batch", type=int, default=16, help="sequences of 128 tokens")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 1)  # the runs' own, before the first use of a device
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_params = write_inputs(folder, args)
        found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
        for number in range(args.rounds):
            for kind in KINDS:
                found[kind].append(measure(folder, kind, f"{kind.replace(' ', '-')}-{number}", args))
        size = sum(path.stat().st_size for path in (folder / "recover").rglob("*") if path.is_file())
        num_states = len(list((folder / "recover").glob("*/*/*/*")))
    print(f"{num_params / 1e6:.1f} million parameters; a training state has {size / num_states / 1e6:.0f} MB")
    print(f"{'saves':12} {'s/step':>8} {'s waited':>9} {'share':>7}   (medians of {args.rounds} runs)")
    for kind, runs in found.items():
        step, waited = (statistics.median(column) for column in zip(*runs))
        print(f"{kind:12} {step:8.3f} {waited:9.3f} {waited / step:7.1%}")


def write_inputs(folder: Path, args: argparse.Namespace) -> int:
    """Writes a model with its tokenizer, and rows; returns the number of parameters."""
    config = ModelConfig(
        family="llama",
        vocab_size=VOCAB,
        hidden_size=args.hidden,
        num_layers=args.layers,
        num_q_heads=args.hidden // 64,
        num_kv_heads=args.hidden // 128,
        head_dim=64,
        ffn_size=args.hidden * 11 // 4,
        max_positions=2048,
    )
    model, layout = build_model(config), Layout.of(ParallelStrategy())
    shardings = tree_shardings(model.axes, model.abstract, inference_rules(layout.strategy), layout)
    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, VOCAB))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    source = folder / "source"
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    wrapped.save_pretrained(source)
    (source / "config.json").write_text(json.dumps(config_to_hf(config) | {"torch_dtype": "float32"}))
    save_hf(init_params(model, shardings, 0), config, folder / "model", source_dir=source, dtype="float32")
    rng = np.random.default_rng(0)
    texts = [" ".join(words[i] for i in rng.integers(2, VOCAB, 126)) for _ in range(args.steps * args.batch)]
    rows = [json.dumps({"id": str(i), "prompt": text[:200], "answer": text[200:]}) for i, text in enumerate(texts)]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    return model.num_params


def measure(folder: Path, kind: str, name: str, args: argparse.Namespace) -> tuple[float, float]:
    """Returns the seconds of a step with what it waited for saves, and of them those of saves: means of a run."""
    words = [
        *(f"model.path={folder}/model", f"dataset.train_path={folder}/rows.jsonl", f"fileroot={folder}"),
        *(
            "experiment_name=saving",
            f"trial_name={name}",
            "n_gpus_per_node=1",
            "mode=local",
            "max_recover_saves_to_keep=1",
        ),
        *("dataset.max_seqlen=128", f"dataset.train_bs_n_seqs={args.batch}", "max_recover_saves_to_keep=1"),
        *([] if kind == "none" else [f"save_freq_steps={args.every}"]),
    ]
    times: list[float] = []
    with noted(times), waiting() if kind == "waited for" else nullcontext():
        assert quickstart.main(["sft", *words]) == 0
    logs = next(folder.glob(f"logs/*/saving/{name}"))
    waited = [r["save_seconds"] for r in read_metrics(logs / "metrics.jsonl") if r["kind"] == "train"]
    # From the end of the first steps to that of the last one: the save at the end of the run is not in it.
    seconds = (times[-1] - times[NUM_WARM]) / (len(times) - 1 - NUM_WARM)
    return seconds, statistics.fmean(waited[NUM_WARM + 1 :])


@contextmanager
def noted(times: list[float]) -> Iterator[None]:
    """While entered, a run notes when each step is recorded."""
    record = Session.record

    def record_and_note(self: Session, taken: Taken) -> None:
        record(self, taken)
        times.append(time.perf_counter())

    Session.record = record_and_note
    try:
        yield
    finally:
        Session.record = record


@contextmanager
def waiting() -> Iterator[None]:
    """While entered, a step waits until its saves are on the disk."""
    save = Session.save

    def save_and_wait(self: Session, position: Position, *, export: bool) -> None:
        save(self, position, export=export)
        self.outputs.checkpointer.wait()

    Session.save = save_and_wait
    try:
        yield
    finally:
        Session.save = save


if __name__ == "__main__":
    main()
