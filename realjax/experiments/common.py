"""Parts of a run that experiments share."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from realjax.allocation.mesh_names import default_nodes, expand_nodes, parse_device_mesh
from realjax.core.identity import Identity
from realjax.core.layout import Layout
from realjax.data.loader import Dataset, Loader
from realjax.data.paired import PairedDataset, load_paired
from realjax.dataflow.graph import MFC, DataflowGraph
from realjax.dataflow.run import Evaluation, Frequency, MovingAverage, RoleSpec, RunSpec
from realjax.hf.families import find_family
from realjax.hf.files import resolve_model_path
from realjax.hf.fingerprint import fingerprint_model
from realjax.hf.generation import load_end_tokens
from realjax.hf.load import load_config
from realjax.options.common import CommonExperimentConfig
from realjax.options.config_dict import to_json
from realjax.options.datasets import PairedComparisonDatasetConfig
from realjax.options.model import ModelFamily, ModelTrainEvalConfig
from realjax.options.parallel import MFCConfig, resolve_parallelism
from realjax.options.paths import run_paths
from realjax.options.resume import sort_options
from realjax.options.supervised import DPOConfig, RWConfig, SFTConfig


def role_spec(name: str, model: ModelTrainEvalConfig, devices: Sequence[jax.Device], *, is_trained: bool) -> RoleSpec:
    """Returns the role that the options of one model describe."""
    dtype = model.dtype
    if dtype == "auto":
        dtype = "float32" if devices[0].platform == "cpu" else "bfloat16"
    option = option_of(name)
    otherwise = f", or {option}.init_from_scratch=True for random ones"
    path = resolve_model_path(model.path, need_weights=not model.init_from_scratch, otherwise=otherwise)
    check_declared(model.type, path, option)
    return RoleSpec(
        name=name,
        path=path,
        is_critic=model.is_critic,
        init_from_scratch=model.init_from_scratch,
        init_critic_from_actor=model.init_critic_from_actor,
        compute_dtype=dtype,
        attention=model.attention,
        remat=model.gradient_checkpointing,
        unroll=model.unroll_layers,
        loss_chunk_tokens=model.loss_chunk_tokens,
        optimizer=model.optimizer if is_trained else None,
        offload=model.offload,
    )


def option_of(role: str) -> str:
    """Returns the option that describes a role: an experiment of one model calls it `model`."""
    return "model" if role == "default" else role


def check_declared(declared: ModelFamily, path: Path, option: str) -> None:
    """Raises ValueError when a model's declared kind is not that of the checkpoint at `path`."""
    family = find_family(load_config(path).family)
    if declared._class is not None and declared._class not in family.published_as:
        raise ValueError(
            f"{option}.type._class: found {declared._class}, but '{path}' holds a {family.causal_class} or its critic; "
            f"set it to {family.name}, or leave it out"
        )


def call_layout(
    name: str,
    config: CommonExperimentConfig,
    call: MFCConfig,
    model: ModelTrainEvalConfig,
    devices: Sequence[jax.Device],
    *,
    is_train: bool,
) -> Layout:
    """Returns where the call `name` runs. ValueError when its mesh and its strategy differ in size."""
    machine = {"n_nodes": config.n_nodes, "n_gpus_per_node": config.n_gpus_per_node}
    sizes = resolve_parallelism(config.allocation_mode, call.parallel, **machine, is_train=is_train)
    chosen = tuple(devices)
    if config.allocation_mode == "manual" and call.device_mesh is not None:
        subject = f"{name}.device_mesh"
        nodes = expand_nodes(config.nodelist, "nodelist") if config.nodelist else default_nodes(config.n_nodes)
        if len(nodes) != config.n_nodes:
            raise ValueError(
                f"nodelist: '{config.nodelist}' names {len(nodes)} nodes, but n_nodes={config.n_nodes}; make them equal"
            )
        per_node = config.n_gpus_per_node
        mesh = parse_device_mesh(call.device_mesh, nodes=nodes, num_devices_per_node=per_node, subject=subject)
        if len(mesh) != sizes.num_devices:
            raise ValueError(
                f"{subject}: '{call.device_mesh}' has {len(mesh)} devices, but {name}.parallel needs "
                f"{sizes.num_devices}; "
                "make the product of its sizes the number of devices"
            )
        chosen = tuple(devices[i] for i in mesh)
    return Layout(sizes.strategy(model.zero_stage if is_train else 0), chosen)


def with_equal_stages(role: RoleSpec, layouts: Mapping[str, Layout]) -> RoleSpec:
    """Returns the role with the empty layers that make its pipeline stages equal in each of these layouts of calls.

    It has one number for all of them: its parameters go from layout to layout as they are. Raises ValueError for more
    stages than layers.
    """
    num_layers = load_config(role.path).num_layers
    for call, layout in layouts.items():
        if (pp := layout.strategy.pp) > num_layers:
            raise ValueError(
                f"{call}: {pp} pipeline stages, but {role.name}'s model has {num_layers} layers; use a "
                f"pipeline_parallel_size of at most {num_layers}"
            )
    num_stages = math.lcm(*(layout.strategy.pp for layout in layouts.values()))
    return replace(role, num_empty_layers=-num_layers % num_stages)


def check_slots(num_slots: int | None, layout: Layout, option: str) -> None:
    """Raises ValueError for a number of answers generated at once that the layout cannot share out."""
    multiple = layout.strategy.row_multiple
    if num_slots is not None and num_slots % multiple:
        raise ValueError(
            f"{option}: {num_slots} answers at once cannot be divided over data x pipeline = {multiple} devices; "
            "use a multiple of it, or null"
        )


def num_common_tokens(roles: Iterable[RoleSpec]) -> int:
    """Returns how many tokens all of the models have rows for: of one tokenizer some have more rows than others."""
    return min(load_config(role.path).vocab_size for role in roles)


def row_multiple(call: MFCConfig, layout: Layout) -> int:
    """Returns what the number of rows must be a multiple of, so that they divide over a call's micro-batches and
    devices.
    """
    return layout.strategy.row_multiple * (call.n_mbs or 1)


def micro_batches(call: MFCConfig) -> dict[str, Any]:
    """Returns the fields of an MFC that say how its options split a batch."""
    return {"num_mbs": call.n_mbs, "max_tokens_per_mb": call.max_tokens_per_mb}


def evaluation_of(call: MFC, held_out: Loader, before: tuple[MFC, ...] = ()) -> Evaluation:
    """Returns the measure of a training call's loss on held-out batches, in micro-batches as that call's."""
    assert call.loss is not None, f"{call.name}: a training call has a loss"
    return Evaluation(
        name=f"evaluation in the micro-batches of {call.name}",
        role=call.role,
        loss=call.loss,
        loader=held_out,
        calls=before,
        num_mbs=call.num_mbs,
        max_tokens_per_mb=call.max_tokens_per_mb,
    )


def make_loaders(
    config: SFTConfig | RWConfig | DPOConfig,
    train: Dataset,
    valid: Dataset | None,
    *,
    num_shards: int,
    row_multiple: int,
) -> tuple[Loader, Loader | None]:
    """Returns the loaders of the training set, and of the held-out set when there is one."""
    loader = Loader(
        train,
        batch_size=config.dataset.train_bs_n_seqs,
        num_epochs=config.exp_ctrl.total_train_epochs,
        row_multiple=row_multiple,
        seed=config.seed,
        num_shards=num_shards,
    )
    if valid is None:
        return loader, None
    # As long as training's where they can be: a bound on tokens that holds one row there holds one here.
    row_len = loader.shapes.row_len
    held_out = Loader(
        valid,
        row_len=row_len if valid.lengths.max() <= row_len else None,
        batch_size=config.dataset.valid_bs_n_seqs,
        num_epochs=1,
        row_multiple=row_multiple,
        shuffle=False,
        allow_partial=True,
        name="dataset.valid_bs_n_seqs",
        seed=config.seed,
        num_shards=num_shards,
    )
    return loader, held_out


def load_pairs(
    data: PairedComparisonDatasetConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[PairedDataset, PairedDataset | None]:
    """Returns the training pairs, and the held-out pairs when there is a valid_path."""

    def load(path: str, name: str) -> PairedDataset:
        return load_paired(
            path,
            tokenizer,
            max_seqlen=data.max_seqlen,
            max_pairs_per_prompt=data.max_pairs_per_prompt,
            use_chat_template=data.use_chat_template,
            name=name,
        )

    train = load(data.train_path, "dataset.train_path")
    return train, load(data.valid_path, "dataset.valid_path") if data.valid_path else None


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of a checkpoint. Raises ValueError when it has none."""
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # each format has its own; that of tokenizer.json raises no narrower class
        reason = str(error).partition("\n")[0].rstrip(" :") or type(error).__name__
        raise ValueError(
            f"model path: '{path}' has no tokenizer that transformers can load ({reason}); add its files"
        ) from error


def run_spec(
    config: CommonExperimentConfig,
    *,
    experiment: str,
    graph: DataflowGraph,
    layouts: Mapping[str, Layout],
    roles: Mapping[str, RoleSpec],
    tokenizer: PreTrainedTokenizerBase,
    loader: Loader,
    averages: tuple[MovingAverage, ...] = (),
    contents: Mapping[str, str] | None = None,
    **parts: Any,
) -> RunSpec:
    """Returns the run of `config` on data of `tokenizer`; `parts` are the fields of RunSpec that are its own.

    `contents` are digests of what decides about the result beside the models and the training data.
    """
    control = config.exp_ctrl
    paths = run_paths(config)

    def layouts_of(name: str) -> dict[str, Layout]:
        # A role and the one that it follows are averaged leaf by leaf, so they have equal trees.
        alike = {name}.union(*({a.role, a.source} for a in averages if name in (a.role, a.source)))
        return {mfc.name: layouts[mfc.name] for mfc in graph.mfcs if mfc.role in alike}

    def finished(role: RoleSpec) -> RoleSpec:
        role = with_equal_stages(role, layouts_of(role.name))
        is_saved = role.optimizer is not None or role.is_averaged
        return replace(role, ends=load_end_tokens(role.path, tokenizer)) if is_saved else role

    return RunSpec(
        experiment=experiment,
        title=f"{config.experiment_name} / {config.trial_name}",
        config_json=to_json(config),
        identity=make_identity(
            config, experiment, roles, {"set of training data": loader.fingerprint, **(contents or {})}
        ),
        paths=paths,
        loader=loader,
        num_epochs=control.total_train_epochs,
        schedule_epochs=control.lr_schedule_epochs,
        save=Frequency(epochs=control.save_freq_epochs, steps=control.save_freq_steps, secs=control.save_freq_secs),
        evaluate=Frequency(epochs=control.eval_freq_epochs, steps=control.eval_freq_steps, secs=control.eval_freq_secs),
        seed=config.seed,
        benchmark_steps=control.benchmark_steps,
        recover_mode=config.recover_mode,
        max_recover_saves=config.max_recover_saves_to_keep,
        max_nonfinite_steps=config.max_nonfinite_steps,
        wandb_mode=config.wandb_mode,
        max_shard_bytes=max_shard_bytes(),
        graph=graph,
        layouts=layouts,
        roles={name: finished(role) for name, role in roles.items()},
        averages=averages,
        **parts,
    )


def make_identity(
    config: CommonExperimentConfig, experiment: str, roles: Mapping[str, RoleSpec], contents: Mapping[str, str]
) -> Identity:
    """Returns what a run that continues is compared with; of paths it is what lies there that counts."""
    options = sort_options(config)
    models = {
        f"model of role {name}": fingerprint_model(role.path, has_weights=not role.init_from_scratch)
        for name, role in roles.items()
    }
    return Identity(
        fixed={"experiment": experiment, **options.fixed},
        contents={**models, **contents},
        steering=options.steering,
        harmless=options.harmless,
    )


def max_shard_bytes() -> float:
    """Returns the largest checkpoint file in bytes: REALJAX_SAVE_MAX_SHARD_SIZE_BYTE, ReaL's name of it, or 5e9."""
    for name in ("REALJAX_SAVE_MAX_SHARD_SIZE_BYTE", "REAL_SAVE_MAX_SHARD_SIZE_BYTE"):
        if text := os.environ.get(name):
            try:
                return float(text)
            except ValueError:
                raise ValueError(f"{name}: found {text!r}; it needs a number of bytes, such as 5e9") from None
    return 5e9
