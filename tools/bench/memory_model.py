"""Holds the memory model against the compiler: calls of Llama's shapes, compiled for H100s that are not here.

    python -m tools.bench.memory_model tests/allocation/memory_cases.csv

A line for each case: the model's bytes of a device, the compiler's, and the error. The file has the cases and what the
compiler said of them. Cases without these figures are compiled, which needs the extra `aot` and up to two minutes each,
and written to the file; with `--compile` all of them.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs on a GPU, here or not

import argparse
import csv
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Lowered

from realjax.algorithms.sft import SFT_LOSS
from realjax.allocation.choice import Choice
from realjax.allocation.memory import Memory, call_memory, home_memory
from realjax.allocation.points.known_models import find_model
from realjax.allocation.prediction import GIB
from realjax.allocation.workload import CallWork, Kind, Lengths, ModelShape, RoleWork
from realjax.aot.targets import Target, find_target
from realjax.core.axes import inference_rules, train_rules, tree_shardings
from realjax.core.batch import Batch
from realjax.core.compute import Compute
from realjax.core.generation_config import GenerationConfig
from realjax.core.layout import Layout, ParallelStrategy
from realjax.core.loss import Loss, LossSums
from realjax.core.metrics import Mean
from realjax.core.optimizer_config import OptimizerConfig
from realjax.engine.admission import SHORTEST_CACHE, Entry, Parts, bucket_length, most_needed
from realjax.engine.compiled import abstract_batch
from realjax.engine.inference import make_inference
from realjax.engine.optim import Optimizer
from realjax.engine.sampling import Sampler
from realjax.engine.slots import SlotPrograms
from realjax.engine.state import abstract_train_state, train_state_shardings
from realjax.engine.train import TrainOptions, make_train_step
from realjax.models.build import Model, build_model
from realjax.models.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Case:
    """A call: of a model, in a layout, on rows of one update or with prompts, answers and slots."""

    kind: Kind
    model: str
    head: str = "logprobs"  # nll, logprobs or values (of a critic)
    dp: int = 1
    pp: int = 1
    tp: int = 1
    sp: bool = False
    zero: int = 0
    rows: int = 0
    row_len: int = 0
    num_mbs: int = 1
    remat: bool = True
    at_home: bool = True
    slots: int = 0
    prompt: int = 0
    new: int = 0

    @property
    def config(self) -> ModelConfig:
        """The model, with the empty layers that make its stages equal."""
        shape, is_critic = find_model(self.model), self.head == "values"
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_q_heads", "num_kv_heads", "head_dim", "ffn_size")
        config = ModelConfig(
            family="llama",
            max_positions=32768,
            tied=shape.is_tied and not is_critic,
            is_critic=is_critic,
            **{name: getattr(shape, name) for name in sizes},
        )
        return dataclasses.replace(config, num_empty_layers=config.count_empty_layers(self.pp))

    @property
    def strategy(self) -> ParallelStrategy:
        return ParallelStrategy(dp=self.dp, pp=self.pp, tp=self.tp, sequence_parallel=self.sp, zero_stage=self.zero)

    @property
    def work(self) -> CallWork:
        """The call as the planner sees it."""
        is_generate = self.kind == "generate"
        return CallWork(
            name="call",
            role="role",
            kind=self.kind,
            model=ModelShape.of(self.config),
            dtype="bfloat16",
            num_sequences=4 * self.slots if is_generate else self.rows,
            prompts=Lengths.all(self.prompt if is_generate else self.row_len),
            answers=Lengths.all(self.new) if is_generate else None,
            pack_fn=lambda multiple: (self.rows, self.row_len),
            scores_vocab=self.head != "values",
        )

    @property
    def role(self) -> RoleWork:
        is_trained = self.kind == "train" or (self.kind == "inference" and self.at_home)
        return RoleWork(name="role", model=ModelShape.of(self.config), dtype="bfloat16", is_trained=is_trained)

    @property
    def choice(self) -> Choice:
        return Choice(
            strategy=self.strategy,
            devices=tuple(range(self.strategy.size)),
            num_mbs=self.num_mbs,
            remat=self.remat and self.kind == "train",
            num_slots=self.slots or None,
        )

    def predict(self) -> Memory:
        """Returns what the model says of the call's program, as far as the compiler sees it."""
        call = dict(call_memory(self.work, self.role, self.choice, at_home=self.at_home).terms)
        # A call at home is given what lives there: of a trained role the masters, in a training step the moments too.
        if self.at_home:
            given = home_memory(self.role, self.work, self.choice).terms
            call |= {name: size for name, size in given.items() if self.kind == "train" or name != "moments"}
        # What the compiler does not see: the kernel's own memory, and what lies there before the program starts.
        return Memory(terms={name: size for name, size in call.items() if name not in UNSEEN})

    def __str__(self) -> str:
        shape = f"{self.slots} slots, {self.prompt} + {self.new}"
        if self.kind != "generate":
            shape = f"{self.rows} x {self.row_len}, {self.num_mbs} mbs" + ("" if self.remat else ", no remat")
        away = "" if self.at_home else ", away"
        return f"{self.kind} {self.model} {self.strategy} {self.head}, {shape}{away}"


UNSEEN = ("attention_scratch", "reallocation")


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """The compiler's bytes of a device: of a generate call those of the larger of its two programs."""

    arguments: int
    outputs: int
    temporaries: int

    @property
    def bytes(self) -> int:
        return self.arguments + self.outputs + self.temporaries


def compile_case(case: Case, target: Target) -> Compiled:
    """Returns the compiler's figures of a case."""
    layout = Layout.of(case.strategy, target.devices(math.ceil(case.strategy.size / 8), min(8, case.strategy.size)))
    found = []
    for lowered in LOWER[case.kind](case, build_model(case.config), layout, target):
        sizes = target.compile(lowered).memory_analysis()
        assert sizes is not None, "XLA tells what it has compiled"
        found.append(
            Compiled(
                arguments=sizes.argument_size_in_bytes,
                outputs=sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
                temporaries=sizes.temp_size_in_bytes,
            )
        )
    return max(found, key=lambda one: one.bytes)


def lower_train(case: Case, model: Model, layout: Layout, _: Target) -> Iterator[Lowered]:
    """Yields a training step, as `runtime.programs` makes it."""
    optimizer = Optimizer(config=OptimizerConfig(), total_updates=100)
    compute = Compute(dtype="bfloat16", remat=case.remat, max_segment_len=case.row_len)
    step = make_train_step(
        model, LOSSES[case.head], optimizer, layout, TrainOptions(compute=compute, num_mbs=case.num_mbs)
    )
    places = train_state_shardings(model, optimizer, layout), layout.replicated
    state = abstract_train_state(model, optimizer, layout)
    yield jax.jit(step, donate_argnums=0, out_shardings=places).lower(state, make_batch(case, layout))


def lower_inference(case: Case, model: Model, layout: Layout, _: Target) -> Iterator[Lowered]:
    """Yields an inference call on its own copy of the parameters, or on a trained role's masters."""
    compute = Compute(dtype="bfloat16", max_segment_len=case.row_len)
    infer = make_inference(model, case.head, layout, compute, case.num_mbs)
    if case.at_home:
        params = abstract_train_state(model, Optimizer(config=OptimizerConfig(), total_updates=100), layout).params
    else:
        params = _place(_cast(model.abstract), model, layout)
    yield jax.jit(infer).lower(params, make_batch(case, layout))


def lower_generate(case: Case, model: Model, layout: Layout, target: Target) -> Iterator[Lowered]:
    """Yields the two programs of a generate call, with all prompts different and as long as they can be."""
    sampler = Sampler(config=GenerationConfig(max_new_tokens=case.new), eos_ids=(2,), seed=1)
    slots = SlotPrograms(model, layout, sampler, case.slots, Compute(dtype="bfloat16"))
    params = slots.abstract_params(_place(_cast(model.abstract), model, layout), target.compile)
    parts = Parts.of(slots)
    length = min(bucket_length(case.prompt + case.new - 1, SHORTEST_CACHE), most_needed(case.prompt, sampler.config))
    entries = [
        Entry(
            tokens=np.full(case.prompt, number, np.int32),
            num_generated=0,
            row_id=number,
            sample_id=0,
            is_greedy=False,
        )
        for number in range(parts.count_rows(range(case.slots)))
    ]
    admission = parts.admit(entries, range(case.slots))
    yield from slots.lower(params, length, admission.prompts, has_greedy=False).values()


LOWER = {"train": lower_train, "inference": lower_inference, "generate": lower_generate}


def make_batch(case: Case, layout: Layout) -> Batch:
    """Returns the shapes of what PPO's calls read of each token."""
    keys = {"loss_mask": np.bool_, "tokens": np.int32, "positions": np.int32, "segment_ids": np.int32}
    shape = (case.rows, case.row_len)
    batch = Batch(arrays={key: np.broadcast_to(np.zeros((), dtype), shape) for key, dtype in keys.items()})
    rules = train_rules if case.kind == "train" else inference_rules
    return abstract_batch(batch, rules(layout.strategy), layout)


def _cast(params):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)


def _place(params, model: Model, layout: Layout):
    places = tree_shardings(model.axes, model.abstract, inference_rules(layout.strategy), layout)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), params, places)


def _policy_loss(outputs, batch: Batch) -> LossSums:
    mask = batch["loss_mask"].astype(jnp.float32)
    return LossSums(Mean(jnp.sum(-outputs["logprobs"] * mask), jnp.sum(mask)), {})


def _value_loss(outputs, batch: Batch) -> LossSums:
    mask = batch["loss_mask"].astype(jnp.float32)
    return LossSums(Mean(jnp.sum(jnp.square(outputs["values"]) * mask), jnp.sum(mask)), {})


LOSSES = {
    "nll": SFT_LOSS,
    "logprobs": Loss(head="logprobs", fn=_policy_loss),
    "values": Loss(head="values", fn=_value_loss),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="cases as CSV, see the fields of Case and Compiled")
    parser.add_argument("--compile", action="store_true", help="compile all cases anew, not only those without figures")
    parser.add_argument("--json", type=Path, help="write the comparison to this file")
    args = parser.parse_args()
    rows = [compare(*one) for one in compile_missing(args.file, anew=args.compile)]
    print(describe(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


def compile_missing(path: Path, *, anew: bool = False) -> Iterator[tuple[Case, Compiled]]:
    """Yields a file's cases with the compiler's figures; those that it lacks are compiled, and written to it."""
    found, target = dict(read_cases(path)), find_target("h100")
    for case, compiled in found.items():
        if compiled is None or anew:
            start = time.perf_counter()
            compiled = found[case] = compile_case(case, target)
            seconds = time.perf_counter() - start
            print(f"{case}: {compiled.bytes / GIB:.2f} GiB, compiled in {seconds:.0f} s", flush=True)
            write_cases(path, found)
        yield case, compiled


def read_cases(path: Path) -> Iterator[tuple[Case, Compiled | None]]:
    """Yields the cases of a file, and what the compiler said of them; None where that is not known."""
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            case = Case(**{field.name: _parse(row[field.name], field.default) for field in dataclasses.fields(Case)})
            sizes = {field.name: row[field.name] for field in dataclasses.fields(Compiled)}
            is_known = all(sizes.values())
            yield case, Compiled(**{name: int(size) for name, size in sizes.items()}) if is_known else None


def write_cases(path: Path, found: Mapping[Case, Compiled | None]) -> None:
    """Writes cases and what the compiler said of them."""
    names = [field.name for kind in (Case, Compiled) for field in dataclasses.fields(kind)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for case, compiled in found.items():
            writer.writerow(dataclasses.asdict(case) | (dataclasses.asdict(compiled) if compiled else {}))


def _parse(text: str, default: object) -> Any:
    return text == "True" if isinstance(default, bool) else int(text) if isinstance(default, int) else text


def compare(case: Case, compiled: Compiled) -> dict[str, Any]:
    """Returns what the model and the compiler say of a case, in bytes of a device, as JSON has it."""
    memory = case.predict()
    return {
        "case": str(case),
        "kind": case.kind,
        "terms": dict(memory.terms),
        "predicted": memory.bytes,
        "compiled": compiled.bytes,
        "temporaries": compiled.temporaries,
        "error": memory.bytes / compiled.bytes - 1,
    }


def describe(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the comparison as a table, with the median and the extremes of the errors."""
    lines = [f"{'GiB a device, predicted':>24} {'compiled':>9} {'temporaries':>11} {'error':>7}  case"]
    for row in rows:
        predicted, compiled, temporaries = (row[name] / GIB for name in ("predicted", "compiled", "temporaries"))
        lines.append(f"{predicted:24.2f} {compiled:9.2f} {temporaries:11.2f} {row['error']:+7.1%}  {row['case']}")
    for kind in (None, *LOWER):
        if errors := [row["error"] for row in rows if kind in (None, row["kind"])]:
            middle = statistics.median(map(abs, errors))
            lines.append(
                f"{kind or 'all'}: {len(errors)} cases, median error {middle:.1%}, "
                f"from {min(errors):+.1%} to {max(errors):+.1%}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
