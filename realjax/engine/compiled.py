"""Jitted functions that compile once per shape, and log each compilation."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from realjax.core.axes import Rules, resolve_sharding
from realjax.core.batch import Batch, find_dims
from realjax.core.layout import Layout
from realjax.core.malloc import give_back_freed_memory
from realjax.core.progress import Progress
from realjax.engine.scratch import HostScratch

logger = logging.getLogger("realjax.engine")

Leaf = tuple[tuple[int, ...], np.dtype, Any]  # an argument's shape, type and sharding
Key = tuple[Any, tuple[Leaf, ...]]  # the tree of the arguments, and its leaves


@dataclass
class CompileLog:
    """The programs a run has compiled: `(name, shapes, seconds)` in order."""

    entries: list[tuple[str, str, float]] = field(default_factory=list)
    progress: Progress = field(default_factory=Progress)  # told when a program is being compiled
    scratch: HostScratch = field(default_factory=HostScratch)  # of all of them
    call: str = "generate"  # whose programs have no name of their own

    def of(self, call: str) -> "CompileLog":
        """Returns the same log, to which a call's programs are added in its name."""
        return replace(self, call=call)

    @property
    def seconds(self) -> float:
        return sum(seconds for _, _, seconds in self.entries)


class Compiled:
    """A function compiled ahead of its first call for each shape of its arguments.

    Ahead-of-time programs refuse arguments of another shape or layout, where `jax.jit` would compile again without a
    word.
    """

    def __init__(self, name: str, fn: Callable[..., object], log: CompileLog, **jit_options: Any) -> None:
        self.name, self.log = name, log
        self.jitted = jax.jit(fn, **jit_options)
        self.programs: dict[Key, jax.stages.Compiled] = {}
        self._bytes: dict[Key, tuple[int, int]] = {}  # of a device, and of this process without the arguments
        # What the program that ran last takes of a device: its arguments, results and scratch. 0 before the first.
        self.device_bytes = 0

    def __call__(self, *args: object) -> Any:
        key = _key(args)
        if key not in self.programs:
            self._keep(key, self._compile(args))
        self.device_bytes, scratch = self._bytes[key]
        self.log.scratch.make_room(scratch, args)
        return self.programs[key](*args)

    def prepare(self, *args: object) -> None:
        """Compiles for arguments like these, or shapes with shardings, unless that is done."""
        key = _key(args)
        if key not in self.programs:
            self._keep(key, self._compile(args))

    def lower(self, *args: object) -> jax.stages.Lowered:
        """Returns the program for arguments like these, not compiled yet. They may be shapes with shardings."""
        return self.jitted.lower(*args)

    def _compile(self, args: tuple[object, ...]) -> jax.stages.Compiled:
        start = time.perf_counter()
        with self.log.progress.compile(self.name):
            program = self.jitted.lower(*args).compile()
        give_back_freed_memory()
        seconds = time.perf_counter() - start
        shapes = ", ".join(str(list(arg["tokens"].shape)) for arg in args if isinstance(arg, Batch))
        why = self._say_why_again(args, shapes)
        self.log.entries.append((self.name, shapes, seconds))
        what = f"{self.name} for rows {shapes}" if shapes else self.name
        logger.info("compiled %s in %.1f s%s (program %d of this run)", what, seconds, why, len(self.log.entries))
        return program

    def _say_why_again(self, args: tuple[object, ...], shapes: str) -> str:
        """Returns what is new for a name that was compiled before; empty for the first."""
        if not (earlier := [found for name, found, _ in self.log.entries if name == self.name]):
            return ""
        if shapes not in earlier:
            return f", again: rows {' and '.join(dict.fromkeys(earlier))} so far"
        if not self.programs:
            return ", again: in other micro-batches, or for sequences of another length"
        (structure, before), (own, now) = list(self.programs)[-1], _key(args)
        if structure != own:
            return ", again: its arguments have other parts"
        old, new = next((a, b) for a, b in zip(before, now, strict=True) if a != b)
        if old[:2] == new[:2]:
            return ", again: an argument lies on the devices in another way"
        return f", again: an argument of {_describe_leaf(new)}, {_describe_leaf(old)} so far"

    def _keep(self, key: Key, program: jax.stages.Compiled) -> None:
        self.programs[key] = program
        num_devices = max((len(place.addressable_devices) for _, _, place in key[1]), default=1)
        self._bytes[key] = program_bytes(program), scratch_bytes(program) * num_devices


def _key(args: tuple[object, ...]) -> Key:
    """Returns what arguments of one program have in common."""
    leaves, structure = jax.tree.flatten(args)
    return structure, tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves)


def _describe_leaf(leaf: Leaf) -> str:
    shape, dtype, _ = leaf
    return f"{dtype}{list(shape)}"


def program_bytes(program: jax.stages.Compiled) -> int:
    """Returns the bytes of device memory that a compiled program takes on each device while it runs."""
    return _sizes(program).argument_size_in_bytes + scratch_bytes(program)


def scratch_bytes(program: jax.stages.Compiled) -> int:
    """Returns what a compiled program takes on each device beside its arguments."""
    sizes = _sizes(program)
    # Results that are written over donated arguments take no room of their own.
    return sizes.output_size_in_bytes - sizes.alias_size_in_bytes + sizes.temp_size_in_bytes


def _sizes(program: jax.stages.Compiled) -> Any:
    sizes = program.memory_analysis()
    assert sizes is not None, "a backend says what its programs take"
    return sizes


def batch_shardings(batch: Batch, rules: Rules, layout: Layout) -> dict[str, NamedSharding]:
    """Returns where the rules put each of a batch's arrays. Raises ValueError when a dim does not divide."""
    return {
        key: resolve_sharding(find_dims(key), batch[key].shape, rules, layout, f"batch key '{key}'") for key in batch
    }


def place_batch(batch: Batch, rules: Rules, layout: Layout) -> Batch:
    """Returns the batch of host arrays on the layout's devices; ValueError as for `batch_shardings`."""
    places = batch_shardings(batch, rules, layout)
    return Batch(arrays={key: place_array(batch[key], sharding) for key, sharding in places.items()})


def abstract_batch(batch: Batch, rules: Rules, layout: Layout) -> Batch:
    """Returns what `place_batch` does, as shapes with shardings, which a program can be lowered for."""
    places = batch_shardings(batch, rules, layout)
    shapes: dict[str, Any] = {
        key: jax.ShapeDtypeStruct(batch[key].shape, batch[key].dtype, sharding=sharding)
        for key, sharding in places.items()
    }
    return Batch(arrays=shapes)


def place_array(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Returns an array that every process has whole, on the devices of `sharding`."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    # device_put would stop all processes to compare what they have.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index], dtype=array.dtype)
