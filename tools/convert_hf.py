"""HuggingFace checkpoints to Orbax and back, and adapters into the weights that they belong to.

    python -m tools.convert_hf to-orbax --hf DIR_OR_HUB_ID --orbax DIR
    python -m tools.convert_hf to-hf --orbax DIR --hf DIR [--like HF_DIR] [--shard-gb 5]
    python -m tools.convert_hf merge --adapter DIR --hf DIR [--base HF_DIR] [--shard-gb 5]

`--check` then compares what was read or written with transformers on a text (needs the extra `torch`), and fails where
they differ.

An Orbax directory holds `params` (the parameter tree, as Orbax's StandardCheckpointer writes it) and, beside it, the
config.json and tokenizer files of the model. `--like` takes config and tokenizer from another HuggingFace directory.
An adapter's directory is PEFT's, as runs with LoRA save it; its weights are those that it names, or `--base`.
"""

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from realjax.apps.errors import report_errors
from realjax.core.trees import Tree, flatten_paths, num_bytes, num_params
from realjax.hf.adapters import has_head, load_adapters, merge_adapters, with_adapters
from realjax.hf.families import find_family
from realjax.hf.files import ADAPTER, CheckpointFiles, read_json, resolve_model_path
from realjax.hf.load import correct_config, has_critic_head, load_config, load_params
from realjax.hf.pieces import find_pieces, list_tensors
from realjax.hf.rules import HEAD
from realjax.hf.save import replace_directory, save_hf
from realjax.hf.save_config import write_config
from realjax.models.build import build_model, make_fill
from realjax.models.config import ModelConfig
from tools.check_hf import check_hf

PARAMS = "params"


def hf_to_orbax(hf: Path, orbax: Path, dtype: str | None) -> tuple[ModelConfig, Tree]:
    """Writes the Orbax directory of a HuggingFace model, by default in the dtype of its files."""
    refuse_existing("--orbax", orbax)
    config = correct_config(load_config(hf), hf)
    model = build_model(config)
    placed = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), model.abstract)
    params = load_params(hf, model, placed, dtype=jnp.dtype(dtype or CheckpointFiles.open(hf).dtype))
    with replace_directory(orbax) as temp:
        write_config(config, temp, hf, jax.tree.leaves(params)[0].dtype)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(temp.absolute() / PARAMS, params)
            checkpointer.wait_until_finished()
    return config, params


def orbax_to_hf(
    orbax: Path, hf: Path, like: str | None, dtype: str | None, shard_bytes: float
) -> tuple[ModelConfig, Tree]:
    """Writes the HuggingFace directory of an Orbax directory, by default in the dtype of its arrays.

    Files of weights have at most `shard_bytes`, or one tensor that is larger.
    """
    refuse_existing("--hf", hf)
    if not (orbax / PARAMS).is_dir():
        raise ValueError(f"--orbax: '{orbax}' has no directory '{PARAMS}'; give one that `to-orbax` wrote")
    source = resolve_model_path(like, need_weights=False) if like else orbax
    config = load_config(source)
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(orbax.absolute() / PARAMS).item_metadata.tree
        here = SingleDeviceSharding(jax.devices()[0])
        # A config may say that the head is the embedding table where these weights have a head of their own.
        config = replace(config, tied=config.tied and "head" not in stored)
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), stored)
        params = checkpointer.restore(orbax.absolute() / PARAMS, wanted)
    arrays = jax.tree.leaves(params)[0].dtype
    save_hf(params, config, hf, source_dir=source, dtype=jnp.dtype(dtype or arrays), max_shard_bytes=shard_bytes)
    return config, params


def merge_adapter(
    adapter: Path, hf: Path, base: str | None, dtype: str | None, shard_bytes: float
) -> tuple[ModelConfig, Tree]:
    """Writes the HuggingFace directory of weights with an adapter added to them, by default in the dtype of these."""
    refuse_existing("--hf", hf)
    named = read_json(adapter / ADAPTER, "--adapter").get("base_model_name_or_path")
    source = resolve_model_path(base or str(named))
    config = correct_config(load_config(source), source)
    if has_head(adapter):
        config = config.as_critic()
    adapted, plain = build_model(with_adapters(config, adapter)), build_model(config)
    place = lambda model: jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), model.abstract)
    is_headless = config.is_critic and not has_critic_head(source)
    fresh = {HEAD: make_fill(HEAD, (config.hidden_size, 1), 0)} if is_headless else None
    params = load_params(source, plain, place(plain), fresh=fresh)
    assert adapted.config.lora is not None
    params = merge_adapters(params, load_adapters(adapter, adapted, place(adapted)), adapted.config.lora)
    written = jnp.dtype(dtype) if dtype else "source"
    save_hf(params, config, hf, source_dir=source, dtype=written, max_shard_bytes=shard_bytes)
    return config, params


def refuse_existing(option: str, directory: Path) -> None:
    """Raises ValueError when the directory to write exists."""
    if directory.exists():
        raise ValueError(f"{option}: '{directory}' exists; name another directory or remove it")


def report(done: str, config: ModelConfig, params: Tree, seconds: float) -> str:
    """Returns one line of what was converted and what it took."""
    shapes = {path: leaf.shape for path, leaf in flatten_paths(params).items()}
    num_tensors = len(list_tensors(find_pieces(find_family(config.family), config, shapes)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return (
        f"{done}: {config.family}, {num_tensors} tensors, {num_params(params):,} parameters, "
        f"{num_bytes(params):,} bytes as {jax.tree.leaves(params)[0].dtype}, "
        f"{seconds:.1f} s, peak memory {peak / 1e6:,.0f} MB"
    )


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the parsed command line."""
    summary = "HuggingFace checkpoints to Orbax and back, and adapters into their weights."
    parser = argparse.ArgumentParser(prog="python -m tools.convert_hf", description=summary)
    commands = parser.add_subparsers(dest="command", required=True)
    to_orbax = commands.add_parser("to-orbax", help="read a HuggingFace model, write an Orbax directory")
    to_orbax.add_argument("--hf", required=True, help="directory or hub identifier of the model to read")
    to_orbax.add_argument("--orbax", required=True, type=Path, help="directory to write; must not exist")
    to_hf = commands.add_parser("to-hf", help="read an Orbax directory, write a HuggingFace model")
    to_hf.add_argument("--orbax", required=True, type=Path, help="directory to read")
    to_hf.add_argument("--hf", required=True, type=Path, help="directory to write; must not exist")
    to_hf.add_argument("--like", help="model to take config.json and tokenizer from (default: the Orbax directory)")
    to_hf.add_argument("--shard-gb", type=float, default=5.0, help="10^9 bytes of a file of weights at most")
    merge = commands.add_parser("merge", help="read an adapter and its weights, write a HuggingFace model of both")
    merge.add_argument("--adapter", required=True, type=Path, help="directory with adapter_config.json")
    merge.add_argument("--hf", required=True, type=Path, help="directory to write; must not exist")
    merge.add_argument("--base", help="model that the adapter belongs to (default: the one that it names)")
    merge.add_argument("--shard-gb", type=float, default=5.0, help="10^9 bytes of a file of weights at most")
    for command in (to_orbax, to_hf, merge):
        command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
        command.add_argument(
            "--check",
            nargs="?",
            const="",
            metavar="TEXT",
            help="compare with transformers on this text, or on one of ours",
        )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Converts as the command line says; returns the exit status."""
    args = parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # host memory is what a conversion needs
    with report_errors("convert_hf") as end:
        convert(args)
    return end.code


def convert(args: argparse.Namespace) -> None:
    """Converts and prints what it took."""
    start = time.monotonic()
    if args.command == "to-orbax":
        if args.check is not None and args.dtype is not None:
            raise ValueError("--check: it compares weights as they are stored; leave out --dtype, or the check")
        directory, done = resolve_model_path(args.hf), f"{args.hf} -> {args.orbax}"
        config, params = hf_to_orbax(directory, args.orbax, args.dtype)
    else:
        if not args.shard_gb > 0:
            raise ValueError(f"--shard-gb: found {args.shard_gb:g}; it must be above 0")
        directory, shard_bytes = args.hf, args.shard_gb * 1e9
        if args.command == "merge":
            done = f"{args.adapter} -> {args.hf}"
            config, params = merge_adapter(args.adapter, directory, args.base, args.dtype, shard_bytes)
        else:
            done = f"{args.orbax} -> {args.hf}"
            config, params = orbax_to_hf(args.orbax, directory, args.like, args.dtype, shard_bytes)
    print(report(done, config, params, time.monotonic() - start))
    if args.check is not None:
        print(check_hf(directory, config, params, args.check).describe())


if __name__ == "__main__":
    sys.exit(main())
