"""Roles with low-rank adapters: what their options say of them, and which roles have weights in common."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from realjax.core.lora_config import LoRAConfig
from realjax.dataflow.run import RoleSpec
from realjax.hf.adapters import list_kernels, with_adapters
from realjax.models.config import MLPConfig, ModelConfig
from realjax.options.lora import LoRAOptions, MergedAdapter, adapter_directory
from realjax.options.model import ModelTrainEvalConfig


def adapters_of_role(model: ModelTrainEvalConfig, option: str, merged: MergedAdapter | None) -> list[Path]:
    """Returns the directories of adapters that a model is made with. Raises ValueError where one is missing."""
    own = [] if model.lora.path is None else [adapter_directory(model.lora.path, f"{option}.lora.path")]
    return own if merged is None else [*own, adapter_directory(merged.path, merged.option)]


def with_lora(role: RoleSpec, lora: LoRAOptions, option: str, merged: MergedAdapter | None) -> RoleSpec:
    """Returns a role with its adapters. Raises ValueError for adapters that its model cannot have."""
    config, into = role.config, None
    if merged is not None:
        into = adapter_directory(merged.path, merged.option)
        try:
            with_adapters(config, into)
        except ValueError as error:
            raise ValueError(f"{merged.option}: {error}") from None
    if not lora.is_on:
        return replace(role, merged=into)
    adapter = None if lora.path is None else adapter_directory(lora.path, f"{option}.lora.path")
    try:
        if adapter is None:
            config = replace(config, lora=_describe(config, lora))
        else:
            config = with_adapters(config, adapter)
        list_kernels(config)
    except ValueError as error:
        subject = f"{option}." if str(error).startswith("lora.") else f"{option}.lora: "
        raise ValueError(f"{subject}{error}") from None
    merges = lora.merge and not config.is_critic
    changes = {"config": config, "adapter": adapter, "merged": into, "merges_adapters": merges}
    return replace(role, base=_name_base(role, into), **changes)


def _describe(config: ModelConfig, lora: LoRAOptions) -> LoRAConfig:
    """Returns the new adapters of a model."""
    has_gate = any(isinstance(x := kind.feed_forward, MLPConfig) and x.gated for kind in config.pattern)
    return lora.describe(config.experts is not None, has_gate)


def _name_base(role: RoleSpec, merged: Path | None) -> str:
    """Returns what names the weights that adapters lie beside: the same for roles that have them in common."""
    return str(role.path.resolve()) if merged is None else f"{role.path.resolve()} with {merged.resolve()}"


def share_bases(roles: Mapping[str, RoleSpec]) -> dict[str, RoleSpec]:
    """Returns the roles, of which those that are never trained have their weights from another's base where that is of
    the same checkpoint: a reference is then its actor without adapters.
    """
    adapted = [role for role in roles.values() if role.base is not None]

    def one(role: RoleSpec) -> RoleSpec:
        own = _name_base(role, role.merged)
        is_frozen = role.optimizer is None and not role.is_averaged
        is_there = any(other.base == own and _is_part(role, other) for other in adapted)
        return replace(role, base=own) if role.base is None and is_frozen and is_there else role

    return {name: one(role) for name, role in roles.items()}


def _is_part(role: RoleSpec, other: RoleSpec) -> bool:
    """Returns whether all of a role's parameters are among another's frozen ones, in the same precision."""
    plain = other.config.without_adapters()
    # Random weights are nobody else's. Both have them only where shapes are planned, of directories without weights.
    is_same = role.config == plain and role.init_from_scratch == other.init_from_scratch
    return is_same and not plain.is_critic and role.compute.dtype == other.compute.dtype
