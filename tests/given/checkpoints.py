"""Tiny random checkpoints as HuggingFace has them, with tokenizers, and ways to read and change them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from realjax.hf.families import config_from_hf
from realjax.hf.files import CheckpointFiles
from realjax.hf.save import save_hf
from realjax.models.build import build_model
from tests.given.models import KINDS, SIZES, random_tree
from tests.given.texts import VOCAB, write_tokenizer

Tensors = dict[str, np.ndarray]
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


def write_llama(directory: Path, *, poison: float | None = None, **changes: Any) -> Path:
    """Writes a Llama of `CONFIG` with `changes`, weights and tokenizer too; `poison` is one weight's value."""
    config = CONFIG | changes
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    shapes = list_shapes(config)
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


def list_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
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


def write_family(directory: Path, family: str, **config: Any) -> Path:
    """Writes a random model of any family with these keys of its config.json, and a tokenizer."""
    hf = {"model_type": family, "vocab_size": VOCAB, "eos_token_id": 0, **config}
    model = build_model(config_from_hf(hf, family))
    params = jax.device_put(random_tree(model, scale=0.1), jax.devices()[0])
    save_hf(params, model.config, directory)
    write_tokenizer(directory)
    return directory


def write_reward_model(directory: Path, **changes: Any) -> Path:
    """Writes a Llama with a scalar head, as rw saves it."""
    write_llama(directory, architectures=["LlamaForSequenceClassification"], id2label={"0": "LABEL_0"}, **changes)

    def cut_head(tensors: Tensors) -> Tensors:
        head = tensors.pop("lm_head.weight")
        return {**tensors, "score.weight": head[:1].copy()}

    return edit_tensors(directory, cut_head)


def edit_tensors(directory: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """Writes a checkpoint's tensors anew, as `change` returns them."""
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return directory


def pad_rows(source: Path, directory: Path, num_rows: int) -> Path:
    """Writes a model with more rows than `source`, which no token has; those of the head are large."""
    write_llama(directory, vocab_size=num_rows)
    tensors = load_file(source / "model.safetensors")
    rng = np.random.default_rng(7)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            old = tensors[name]
            more = rng.standard_normal((num_rows - len(old), old.shape[1])).astype(np.float32)
            tensors[name] = np.concatenate([old, 4 * more])
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def make_checkpoint(out_dir: Path, kind: str, *, dtype: str = "float32", task: str = "CausalLM", **options) -> Path:
    """Writes a random checkpoint of `kind`; every tensor, norms and biases too, is random."""
    torch = pytest.importorskip("torch")
    import transformers

    model_type, keys = KINDS[kind]
    keys = {**SIZES, "pad_token_id": 0, **keys, **options.pop("config", {})}
    config = transformers.AutoConfig.for_model(model_type, **keys)
    torch.manual_seed(1)
    model = getattr(transformers, f"AutoModelFor{task}").from_config(config)
    with torch.no_grad():
        stored = model.state_dict()
        for tensor in (*model.parameters(), *(x for name, x in model.named_buffers() if name in stored)):
            tensor.normal_()
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
    kept = {key: value for key, value in json.loads(file.read_text()).items() if key not in changes}
    file.write_text(json.dumps(kept | {key: value for key, value in changes.items() if value is not None}))


def read_tensors(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Returns dtype, shape and bytes of every tensor of a checkpoint."""
    files = CheckpointFiles.open(directory)
    with files.reader() as read:
        return {
            name: (info.dtype, info.shape, read(name, tuple(slice(0, n) for n in info.shape)).tobytes())
            for name, info in files.tensors.items()
        }


def random_index(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Returns one non-empty random slice per dim."""
    cuts = [sorted(rng.choice(n + 1, 2, replace=False).tolist()) for n in shape]
    return tuple(slice(start, stop) for start, stop in cuts)
