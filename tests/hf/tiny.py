"""Tiny random checkpoints, as transformers writes them, and ways to compare directories."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from realjax.hf.files import CheckpointFiles
from realjax.models.build import Model

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
KINDS = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "linear-rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
    "qwen2-windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-biases": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
}


def make_checkpoint(out_dir: Path, kind: str, *, dtype: str = "float32", task: str = "CausalLM", **options) -> Path:
    """Writes a random checkpoint of `kind`; every tensor, norms and biases too, is random."""
    torch = pytest.importorskip("torch")
    import transformers

    name, switches = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**SIZES, **switches, pad_token_id=0, **options.pop("config", {}))
    torch.manual_seed(1)
    model = getattr(transformers, f"{name}For{task}")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.to(getattr(torch, dtype)).save_pretrained(out_dir, **options)
    return out_dir


def make_bin(source: Path, out_dir: Path, *, num_files: int = 1, zipped: bool = True) -> Path:
    """Writes the checkpoint `source` as pytorch_model.bin, or as its shards and index."""
    import torch
    from safetensors.torch import load_file

    out_dir.mkdir()
    (out_dir / "config.json").write_text((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for i in range(num_files):
        file = "pytorch_model.bin" if num_files == 1 else f"pytorch_model-{i + 1:05}-of-{num_files:05}.bin"
        part = {name: tensors[name] for name in names[i::num_files]}
        weight_map |= dict.fromkeys(part, file)
        torch.save(part, out_dir / file, _use_new_zipfile_serialization=zipped)
    if num_files > 1:
        (out_dir / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return out_dir


def edit_config(directory: Path, **changes) -> None:
    """Changes keys of config.json; None removes one."""
    file = directory / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def tensors_of(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Returns dtype, shape and bytes of every tensor of a checkpoint."""
    files = CheckpointFiles.open(directory)
    with files.reader() as read:
        return {
            name: (info.dtype, info.shape, read(name, tuple(slice(0, n) for n in info.shape)).tobytes())
            for name, info in files.tensors.items()
        }


def on_one_device(model: Model) -> dict:
    """Returns shardings that put every parameter on the first device."""
    return jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), model.abstract)


def random_index(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Returns one non-empty random slice per dim."""
    cuts = [sorted(rng.choice(n + 1, 2, replace=False).tolist()) for n in shape]
    return tuple(slice(start, stop) for start, stop in cuts)
