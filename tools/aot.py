"""Compiles all programs of a command for machines that are not here, and tells what they take, send and multiply.

    python -m tools.aot ppo key=value ... --target h100

The command is spelled as for `realjax`. No weights are read: a model's directory needs its config.json, and the first
one its tokenizer. See docs/aot.md.
"""

import os

# Before jax is imported: no accelerator is looked for, also where a plugin for one is installed.
os.environ["JAX_PLATFORMS"] = "cpu"

import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import jax

from realjax.allocation.allocate import allocate
from realjax.allocation.settle import settle_open
from realjax.aot.advise import verdict
from realjax.aot.lower import lower_run
from realjax.aot.report import Compiler, ProgramReport, RunReport, describe
from realjax.aot.targets import Target, find_target, list_targets
from realjax.apps import quickstart
from realjax.apps.errors import report_errors
from realjax.apps.plan import build_spec
from realjax.dataflow.run import RunSpec
from realjax.launch.local import DEFAULT_GPUS_PER_NODE
from realjax.options.common import CommonExperimentConfig
from realjax.options.machine import resolve_machine

logger = logging.getLogger("realjax.aot")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables and the verdict; returns 1 where the run does not fit, else 0."""
    args = _read_arguments(argv)
    with report_errors() as end:
        command = quickstart.read_command(args.words)
        if command is None:
            end.code = 2
            return end.code
        name, config = command
        target = find_target(args.target)
        report, spec = compile_run(name, config, target, num_layers=args.layers)
        print(describe(report))
        print(verdict(report, spec))
        if args.json:
            args.json.write_text(report.to_json())
        margin = report.margin_bytes
        end.code = 0 if margin is None or margin >= 0 else 1
    return end.code


def compile_run(
    name: str, config: CommonExperimentConfig, target: Target, *, num_layers: int | None = None
) -> tuple[RunReport, RunSpec]:
    """Returns what compiling the run of an experiment's options has shown, and the run.

    With `num_layers`, models have only so many layers. ValueError for what the user can mend.
    """
    spec = build_spec(name, resolve_machine(config, DEFAULT_GPUS_PER_NODE, {}))
    spec = settle_open(spec, find_devices(spec, target), target.memory_bytes)
    return compile_spec(spec, target, num_layers=num_layers)


def find_devices(spec: RunSpec, target: Target) -> Sequence[jax.Device]:
    """Returns the target's devices that a run has."""
    options, settings = spec.allocation, cast(Any, jax.config)
    if target.config is None and settings.jax_num_cpu_devices < options.num_devices:
        # Only possible before the first use of a device.
        jax.config.update("jax_num_cpu_devices", options.num_devices)
    return target.devices(options.n_nodes, options.n_gpus_per_node)


def compile_spec(spec: RunSpec, target: Target, *, num_layers: int | None = None) -> tuple[RunReport, RunSpec]:
    """Returns what compiling a run has shown, and the run with the layers that were compiled."""
    whole = {role: one.config.num_layers for role, one in spec.roles.items()}
    if num_layers is not None:
        spec = cut_layers(spec, num_layers)
    plan = allocate(spec, find_devices(spec, target))
    logger.info("allocation:\n%s", plan.describe())
    compiler, programs = Compiler(target), list[ProgramReport]()
    for program in lower_run(spec, plan, compiler.compile):
        programs.append(compiler.report(program))
        logger.info("compiled %s in %.1f s", programs[-1].title, programs[-1].compile_seconds)
    compiled = {role: one.config.num_layers for role, one in spec.roles.items()}
    report = RunReport(
        experiment=spec.experiment,
        target=target.title,
        memory_bytes=target.memory_bytes,
        num_hosts=spec.allocation.n_nodes,
        per_host=spec.allocation.n_gpus_per_node,
        programs=tuple(programs),
        layers={role: (compiled[role], num) for role, num in whole.items() if compiled[role] != num},
    )
    return report, spec


def cut_layers(spec: RunSpec, num_layers: int) -> RunSpec:
    """Returns the run with models of at most so many layers."""
    cut = lambda config: dataclasses.replace(config, num_layers=min(num_layers, config.num_layers))
    roles = {name: dataclasses.replace(role, config=cut(role.config)) for name, role in spec.roles.items()}
    return dataclasses.replace(spec, roles=roles)


def _read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.aot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("words", nargs="*", metavar="experiment key=value ...", help="the command, as for realjax")
    parser.add_argument("--target", choices=list_targets(), default="h100", help="the kind of device")
    parser.add_argument("--json", type=Path, help="write all of it to this file too")
    parser.add_argument("--layers", type=int, help="compile models of at most so many layers")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    sys.exit(main())
