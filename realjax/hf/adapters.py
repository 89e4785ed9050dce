"""Low-rank adapters in PEFT's form: adapter_config.json and adapter_model.safetensors, in and out.

The rules of a model's family say where each kernel lies in a checkpoint; an adapter's A `[r, in]` and B `[out, r]` are
called after it.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.typing import DTypeLike

from realjax.core.faults import naming
from realjax.core.json_text import JsonObject
from realjax.core.lora_config import TARGETS, LoRAConfig
from realjax.core.manifest import write_manifest
from realjax.core.trees import Tree, flatten_paths, map_paths, unflatten_paths
from realjax.hf.dims import DIM, Shape
from realjax.hf.families import find_family
from realjax.hf.files import ADAPTER, FORMATS, CheckpointFiles, TensorInfo, read_json
from realjax.hf.load import make_fill, place_leaf
from realjax.hf.pieces import (
    CRITIC_HEAD_NAME,
    Piece,
    check_tensors,
    group_by_leaf,
    list_pieces,
    list_tensors,
    name_sizes,
    number_layers,
)
from realjax.hf.rules import HEAD, Rule
from realjax.hf.save import OutTensor, find_writer, hold_pieces, make_fetch, replace_directory, write_tensors
from realjax.models.build import Model, build_model
from realjax.models.config import ModelConfig
from realjax.models.lora import is_adapter, merge_stack

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."  # of every name: PEFT wraps a model in two
# What PEFT can ask for and we do not compute, with the values that ask for nothing.
UNREAD: Mapping[str, tuple[object, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "lora_bias": (False, None),
    "megatron_config": (None,),
    "trainable_token_indices": (None, []),
}


def list_kernels(config: ModelConfig) -> dict[str, Rule]:
    """Returns the rule of each kernel that a target of the model's adapters stands for, by the kernel's path.

    Paths are those of a stack of all layers. Raises ValueError for a target of which a checkpoint's tensor holds other
    kernels too: an adapter of such a tensor is one for all of them.
    """
    family, lora = find_family(config.family), config.lora
    assert lora is not None, "a model with adapters"
    kernels: dict[str, Rule] = {}
    for target in lora.targets:
        paths = [f"layers/{part}/{target}/kernel" for part in ("attn", "mlp")]
        for rule in (rule for rule in family.rules if rule.path in paths):
            sharing = {other.path for other in family.rules if other.name == rule.name}
            if rule.path in kernels or len(sharing) > 1 or "+" in rule.dims:
                raise ValueError(
                    f"lora.targets: found {target}, but checkpoints of {family.name} hold it in one tensor with others "
                    f"({rule.name.format(layer=0)}), whose adapters PEFT has no form for; use the targets among "
                    f"{' '.join(TARGETS)} that have tensors of their own"
                )
            kernels[rule.path] = rule
    return kernels


def list_rules(config: ModelConfig) -> list[Rule]:
    """Returns the rules of all that is trained in a model with adapters; ValueError as for `list_kernels`."""
    rules: list[Rule] = []
    for path, rule in list_kernels(config).items():
        inputs, outputs, ours = _split_dims(rule)
        stem, name = path.removesuffix("kernel"), PREFIX + rule.name.removesuffix("weight")
        rules += [
            Rule(f"{stem}lora_a", f"{name}lora_A.weight", f"r {inputs} -> {' '.join(_letters(inputs, ours))} r"),
            Rule(f"{stem}lora_b", f"{name}lora_B.weight", f"{outputs} r -> r {' '.join(_letters(outputs, ours))}"),
        ]
    head = [Rule(HEAD, PREFIX + CRITIC_HEAD_NAME, "S D -> D S")] if config.is_critic else []
    return [*rules, *head]


def _split_dims(rule: Rule) -> tuple[str, str, list[str]]:
    """Returns how a checkpoint writes a kernel's inputs and its outputs, and the letters of ours, inputs first."""
    theirs, ours = rule.dims.split(" -> ")
    first, second = DIM.findall(theirs)
    letters = ours.split()
    # A linear map's tensor has its outputs first, a Conv1D's its inputs.
    return (first, second, letters) if _letters(first, letters)[0] == letters[0] else (second, first, letters)


def _letters(dim: str, ours: list[str]) -> list[str]:
    """Returns the letters of one dim of theirs, in our order."""
    own = dim.strip("()").split()
    return [letter for letter in ours if letter in own]


def list_adapter_pieces(config: ModelConfig, shapes: Mapping[str, Shape]) -> list[Piece]:
    """Returns the pieces of what is trained against the tensors of an adapter."""
    return list_pieces(list_rules(config), shapes, number_layers(config), name_sizes(config))


def save_adapters(trained: Tree, config: ModelConfig, out_dir: str | Path, *, base: str | Path) -> None:
    """Writes what is trained in a model with adapters as PEFT does; `base` is the checkpoint that they belong to.

    The directory appears whole or not at all. Every process calls this; the first that holds the arrays writes.
    """
    begin_save_adapters(trained, config, Path(out_dir), base=base)()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("save_adapters: written")


def begin_save_adapters(trained: Tree, config: ModelConfig, out_dir: Path, *, base: str | Path) -> Callable[[], None]:
    """Copies what is trained off the devices; returns what then writes it in any thread, as `save_adapters` does."""
    leaves = flatten_paths(trained)
    tensors = list_tensors(list_adapter_pieces(config, {path: leaf.shape for path, leaf in leaves.items()}))
    held_fn = hold_pieces((piece for tensor in tensors for piece in tensor.pieces), make_fetch(leaves))
    settings, is_writer = describe_adapters(config, base), jax.process_index() == find_writer(trained)

    def write() -> None:
        if not is_writer:
            return
        with naming(out_dir), replace_directory(out_dir) as temp:
            (temp / ADAPTER).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            out = [OutTensor(tensor=tensor, dtype=np.dtype(np.float32)) for tensor in tensors]
            write_tensors(temp, out, held_fn, float("inf"), name=WEIGHTS[0])
            write_manifest(temp)

    return write


def describe_adapters(config: ModelConfig, base: str | Path) -> JsonObject:
    """Returns the adapter_config.json of a model's adapters."""
    lora = config.lora
    assert lora is not None, "a model with adapters"
    kernels = list_kernels(config).values()
    modules = [rule.name.removesuffix(".weight").split(".") for rule in kernels]
    inputs_first = {_split_dims(rule)[0] == DIM.findall(rule.dims)[0] for rule in kernels}
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if config.is_critic else "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "use_rslora": lora.rank_stabilised,
        # Two names each: in GPT-2 the last one alone is that of two maps.
        "target_modules": sorted(".".join(module[-2:]) for module in modules),
        "modules_to_save": [CRITIC_HEAD_NAME.removesuffix(".weight")] if config.is_critic else None,
        "fan_in_fan_out": inputs_first == {True},
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }


def read_lora(path: str | Path, config: ModelConfig) -> LoRAConfig:
    """Returns the adapters of a model that a directory holds. Raises ValueError for what we do not compute."""
    settings, files = read_json(Path(path) / ADAPTER, "adapter"), open_adapter(path)
    if (kind := settings.get("peft_type")) != "LORA":
        raise ValueError(f"adapter '{path}': peft_type is {kind}; only LORA is supported")
    for key, plain in UNREAD.items():
        if settings.get(key) not in plain:
            raise ValueError(f"adapter '{path}': {key} is {settings[key]!r}, which is not supported; train one without")
    found = {name.removeprefix(PREFIX) for name in files.tensors}
    targets = []
    for target in TARGETS:
        paths = [f"layers/{part}/{target}/kernel" for part in ("attn", "mlp")]
        names = [rule.name.removesuffix("weight") for rule in find_family(config.family).rules if rule.path in paths]
        spellings = {f"{name.format(layer=i)}lora_A.weight" for name in names if "{expert}" not in name
                     for i in range(config.num_layers)}  # fmt: skip
        targets += [target] if spellings & found else []
    if not targets:
        raise ValueError(
            f"adapter '{path}': its tensors, such as {next(iter(files.tensors), 'none')!r}, are of no map of a "
            f"{config.family}; give an adapter of this model"
        )
    return LoRAConfig(
        rank=int(settings["r"]),
        alpha=float(settings["lora_alpha"]),
        targets=tuple(targets),
        rank_stabilised=bool(settings.get("use_rslora", False)),
    )


def open_adapter(path: str | Path) -> CheckpointFiles:
    """Returns the index of an adapter's tensors. Raises ValueError where there are none."""
    directory = Path(path)
    file = next((directory / name for name in WEIGHTS if (directory / name).is_file()), None)
    if file is None or not (directory / ADAPTER).is_file():
        raise ValueError(f"adapter '{path}': it needs {ADAPTER} and {WEIGHTS[0]}, as peft saves them")
    opened = FORMATS[file.suffix](file)
    found = opened.infos()
    opened.close()
    tensors = {name: TensorInfo(file=file, name=name, shape=s, dtype=dtype) for name, (s, dtype) in found.items()}
    return CheckpointFiles(directory=directory, tensors=tensors)


def has_head(path: str | Path) -> bool:
    """Returns whether an adapter's directory holds a scalar head beside it."""
    return PREFIX + CRITIC_HEAD_NAME in open_adapter(path).tensors


def check_adapters(path: str | Path, config: ModelConfig) -> None:
    """Raises ValueError when a directory's tensors are not those of the model's adapters; reads their heads only."""
    model = build_model(config)
    match_adapters(path, model)


def match_adapters(path: str | Path, model: Model) -> tuple[CheckpointFiles, dict[str, list[Piece]]]:
    """Returns an adapter's files, and the pieces of each leaf that they hold."""
    files = open_adapter(path)
    shapes = {name: leaf.shape for name, leaf in flatten_paths(model.take_trained(model.abstract)).items()}
    if HEAD in shapes and PREFIX + CRITIC_HEAD_NAME not in files.tensors:
        del shapes[HEAD]  # begun anew, or the checkpoint's
    pieces = list_adapter_pieces(model.config, shapes)
    check_tensors(f"adapter '{path}'", list_tensors(pieces), files.shapes)
    return files, group_by_leaf(pieces)


def load_adapters(path: str | Path, model: Model, shardings: Tree, dtype: DTypeLike = np.float32) -> Tree:
    """Returns what a directory holds of the parameters that are trained in `model`, placed by `shardings`.

    Raises ValueError, before a tensor is read, when it is not an adapter of that model.
    """
    files, pieces = match_adapters(path, model)
    places, shapes = flatten_paths(shardings), flatten_paths(model.abstract)
    return unflatten_paths(
        {
            name: place_leaf(make_fill(files, parts), shapes[name].shape, places[name], np.dtype(dtype))
            for name, parts in pieces.items()
        }
    )


def merge_adapters(base: Tree, adapters: Tree, lora: LoRAConfig) -> Tree:
    """Returns the parameters W + scale * A B, and others of `adapters` in place of the base's; the base is given up."""
    found, merge = flatten_paths(adapters), jax.jit(merge_stack, static_argnums=3, donate_argnums=0)

    def one(path: str, leaf: jax.Array) -> jax.Array:
        stem = path.removesuffix("kernel")
        if f"{stem}lora_a" in found:
            return merge(leaf, found[f"{stem}lora_a"], found[f"{stem}lora_b"], lora.scale)
        return found[path].astype(leaf.dtype) if path in found and not is_adapter(path) else leaf

    return map_paths(one, base)


def with_adapters(config: ModelConfig, path: str | Path) -> ModelConfig:
    """Returns the model with the adapters that a directory holds; ValueError where it holds none of it."""
    found = replace(config, lora=read_lora(path, config))
    check_adapters(path, found)
    return found
