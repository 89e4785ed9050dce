"""The machine that a run is for, where its options leave that open: what is there, and what its sizes ask for."""

import dataclasses
from collections.abc import Mapping
from typing import Literal, TypeVar

from realjax.options.common import CommonExperimentConfig
from realjax.options.parallel import count_asked, data_parallel

Config = TypeVar("Config", bound=CommonExperimentConfig)
Mode = Literal["slurm", "local", "ray"]
# What a launcher sets inside its jobs.
JOB_VARIABLES: Mapping[str, str] = {"slurm": "SLURM_JOB_ID", "ray": "RAY_JOB_ID"}


def resolve_machine(config: Config, num_present: int, environ: Mapping[str, str]) -> Config:
    """Returns `config` with mode, n_gpus_per_node and allocation_mode filled in where they are null.

    `num_present` are the devices of one machine. Sizes that are given decide, so that a command for a part of a machine
    needs nothing else.
    """
    asked, per_node = count_asked(config), config.n_gpus_per_node
    if per_node is None:
        per_node = num_present if asked is None else max(1, -(-asked // config.n_nodes))
    jobs: tuple[Mode, ...] = ("slurm", "ray")
    job = next((mode for mode in jobs if JOB_VARIABLES[mode] in environ), "local")
    return dataclasses.replace(
        config,
        mode=config.mode or job,
        n_gpus_per_node=per_node,
        allocation_mode=config.allocation_mode or data_parallel(config.n_nodes * per_node),
    )


def devices_per_node(config: CommonExperimentConfig) -> int:
    """Returns n_gpus_per_node of a config whose machine is resolved."""
    assert config.n_gpus_per_node, "resolve_machine comes first"
    return config.n_gpus_per_node
