"""Tiny inputs of a whole SFT run, the run itself (here or in a process of its own), and what it left."""

import getpass
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from realjax.apps import quickstart
from realjax.record.metrics import read_metrics

REPOSITORY = Path(__file__).resolve().parents[2]
WORDS = [
    "the",
    "a",
    "film",
    "was",
    "is",
    "good",
    "bad",
    "long",
    "short",
    "and",
    "but",
    "very",
    "never",
    "its",
    "end",
    "plot",
    "cast",
    "music",
    "dull",
    "warm",
]
VOCAB = 320
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 0,
    "torch_dtype": "float32",
}
# What differs between two runs that do the same.
CLOCKS = ("time", "seconds", "tokens_per_second", "tflops")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Paths of a model directory and two data files."""

    model: Path
    train: Path
    valid: Path


def write_inputs(folder: Path, *, num_train: int = 520) -> Inputs:
    """Writes a random Llama, its tokenizer and rows of random words."""
    inputs = Inputs(
        model=write_llama(folder / "llama"), train=folder / "sft-train.jsonl", valid=folder / "sft-valid.jsonl"
    )
    write_rows(inputs.train, num_train, seed=1)
    write_rows(inputs.valid, 40, seed=2)
    return inputs


def write_llama(directory: Path, *, poison: float | None = None, **changes: Any) -> Path:
    """Writes a Llama of `CONFIG` with `changes`, weights and tokenizer too; `poison` is one weight's value."""
    config = CONFIG | changes
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    shapes = llama_shapes(config)
    # Norms lie about 1, matrices about 0.
    tensors = {
        name: (rng.standard_normal(shape) * 0.05 + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }
    if poison is not None:
        tensors["model.norm.weight"][0] = poison
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(directory)
    return directory


def llama_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the name and shape of every tensor of an untied Llama without biases."""
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = {
        "self_attn.q_proj.weight": (d, d),
        "self_attn.k_proj.weight": (kv, d),
        "self_attn.v_proj.weight": (kv, d),
        "self_attn.o_proj.weight": (d, d),
        "mlp.gate_proj.weight": (f, d),
        "mlp.up_proj.weight": (f, d),
        "mlp.down_proj.weight": (d, f),
        "input_layernorm.weight": (d,),
        "post_attention_layernorm.weight": (d,),
    }
    return {
        "model.embed_tokens.weight": (v, d),
        "model.norm.weight": (d,),
        "lm_head.weight": (v, d),
        **{f"model.layers.{i}.{name}": s for i in range(config["num_hidden_layers"]) for name, s in layer.items()},
    }


def write_tokenizer(directory: Path) -> None:
    """Writes a byte-level BPE tokenizer trained on `WORDS`; `<eos>` is token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.save_pretrained(directory)


def write_rows(path: Path, num_rows: int, seed: int) -> Path:
    """Writes rows with a prompt of 2 to 4 words and an answer of 3 to 6."""
    rng = np.random.default_rng(seed)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(low, high)))

    rows = [{"id": i, "prompt": text(2, 5), "answer": " " + text(3, 7)} for i in range(num_rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A run with small batches on few devices: its inputs, its fileroot, its name, and its options."""

    inputs: Inputs
    root: Path
    name: str = "trial"
    options: Mapping[str, Any]

    def words(self, **changes: Any) -> list[str]:
        """Returns the command line after `sft`; `__` in a change's name stands for a dot."""
        options = {
            "experiment_name": "e2e",
            "trial_name": self.name,
            "fileroot": self.root,
            "mode": "local",
            "model.path": self.inputs.model,
            "dataset.train_path": self.inputs.train,
            "dataset.max_seqlen": 32,
            "model.optimizer.lr": 0.01,
            **self.options,
            **{name.replace("__", "."): value for name, value in changes.items()},
        }
        return [f"{name}={value}" for name, value in options.items()]

    def run(self, **changes: Any) -> int:
        """Runs the command in this process and returns its exit code."""
        return quickstart.main(["sft", *self.words(**changes)])

    def start(self, **changes: Any) -> subprocess.Popen:
        """Starts the command in a process of its own, its output in `<root>/<name>.log`."""
        return start_process(
            ["-m", "realjax.apps.quickstart", "sft", *self.words(**changes)], self.root / f"{self.name}.log"
        )

    def folder(self, kind: str) -> Path:
        """Returns the trial's directory of `logs`, `checkpoints` or `recover`."""
        return self.root / kind / getpass.getuser() / "e2e" / self.name

    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder("logs") / "metrics.jsonl")

    def steps(self) -> list[int]:
        return [record["step"] for record in self.metrics() if record["kind"] == "train"]

    def weights(self, step: int) -> dict[str, np.ndarray]:
        """Returns the tensors of the HuggingFace checkpoint after `step` steps."""
        (directory,) = self.folder("checkpoints").glob(f"default/*globalstep{step}")
        return load_file(directory / "model.safetensors")

    def state(self, step: int, role: str = "default") -> dict[str, np.ndarray]:
        """Returns every array of a role's state saved after `step` steps: parameters, moments, counters."""
        directory = epath.Path(self.folder("recover") / str(step) / f"role_{role}")
        # On one device: the save knows those of the run, which may have had other processes.
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        saved = ocp.StandardCheckpointHandler().metadata(directory).tree
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), saved)
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(directory, target)
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def start_process(args: Iterable[str], log: Path, **environment: str) -> subprocess.Popen:
    """Starts Python on `args` at the top of the checkout with no device settings but the run's own."""
    kept = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    with log.open("a") as file:
        return subprocess.Popen(
            [sys.executable, *args], cwd=REPOSITORY, env=kept | environment, stdout=file, stderr=subprocess.STDOUT
        )


def without_clocks(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns metrics records without what a clock put into them, of the step or, as `time/<call>`, of a call."""
    return [
        {name: value for name, value in record.items() if name.partition("/")[0] not in CLOCKS} for record in records
    ]


def differing(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> list[str]:
    """Returns the names of arrays that differ in a bit, or that only one side has."""
    return [
        name
        for name in sorted(found.keys() | expected.keys())
        if name not in found or name not in expected or found[name].tobytes() != expected[name].tobytes()
    ]
