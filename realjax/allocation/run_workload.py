"""From the description of a run to the workload of one of its steps."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import networkx as nx
import numpy as np

from realjax.allocation.measured_answers import has_record, read_answers, read_share_of_use
from realjax.allocation.modes import read_mesh
from realjax.allocation.params import count_params, count_trained
from realjax.allocation.workload import CallWork, Fixed, Lengths, ModelShape, PackFn, RoleWork, Workload
from realjax.core.layout import ParallelStrategy
from realjax.data.loader import Loader, plan_shapes
from realjax.data.packing import bucket_rows, pack_rows, rollout_row_len
from realjax.dataflow.graph import Generate, Host, Inference, Train
from realjax.dataflow.run import RoleSpec, RunSpec

MOST_STEPS = 8  # whose lengths stand for those of all


def read_workload(spec: RunSpec, platform: str, answers: Lengths | None = None) -> Workload:
    """Returns what a step of the run computes on devices of a platform (as JAX names it).

    `answers` are the lengths of answers; None: as the planner's options say, else as long as they can be.
    """
    answers = answers or expect_answers(spec)
    batches = list(sample_lengths(spec.loader))
    roles = {name: describe_role(spec, spec.roles[name], platform) for name in spec.graph.roles}
    generate = next((call for call in spec.graph.calls if isinstance(call, Generate)), None)
    reader = Reader(spec, batches, generate, answers)
    calls = tuple(reader.describe(call, roles[call.role]) for call in spec.graph.order if not isinstance(call, Host))
    return Workload(calls=calls, roles=roles)


def expect_answers(spec: RunSpec) -> Lengths | None:
    """Returns the lengths of answers to plan for; None where nothing says that they are not the longest.

    Raises ValueError where a run that is named has recorded none.
    """
    planner = spec.allocation.planner
    if planner.answer_tokens is not None:
        return Lengths.all(round(planner.answer_tokens))
    if planner.answers_from is not None:
        if (found := read_answers(Path(planner.answers_from))) is None:
            raise ValueError(
                f"planner.answers_from: no step of '{planner.answers_from}' has recorded lengths of answers; name the "
                "log directory of a run that generates, or set planner.answer_tokens"
            )
        return found
    return read_answers(spec.paths.logs) if planner.replan and has_record(spec.paths.logs) else None


def expect_draws(spec: RunSpec) -> float:
    """Returns how many times as many prompts as a step wants are drawn for it; 1 where nothing says that it is more.

    Where a share p of them is of use, the k-th draw takes (1 - p)^(k - 1) of those wanted: together, in at most K
    draws, (1 - (1 - p)^K) / p.
    """
    planner, sampling = spec.allocation.planner, spec.sampling
    record = planner.answers_from or (spec.paths.logs if planner.replan else None)
    if sampling is None or record is None or (share := read_share_of_use(Path(record))) is None:
        return 1.0
    return (1 - (1 - share) ** sampling.max_draws) / share if share else float(sampling.max_draws)


def describe_role(spec: RunSpec, role: RoleSpec, platform: str) -> RoleWork:
    """Returns what the planner needs to know of a role."""
    plain, is_trained = role.config.without_adapters(), spec.graph.train_call(role.name) is not None
    is_beside = role.base is not None and not is_trained
    return RoleWork(
        name=role.name,
        model=ModelShape.of(plain),
        dtype=role.compute.on(platform).dtype,
        is_trained=is_trained,
        is_averaged=role.is_averaged,
        offload=False if is_beside else role.offload,
        trained_share=count_trained(role.config) / count_params(plain),
        is_beside=is_beside,
    )


def sample_lengths(loader: Loader) -> Sequence[np.ndarray]:
    """Returns the lengths of the examples of the run's first steps."""
    return [loader.lengths(step) for step in range(min(MOST_STEPS, loader.total_steps))]


class Reader:
    """Describes the calls of one run."""

    def __init__(
        self, spec: RunSpec, batches: Sequence[np.ndarray], generate: Generate | None, answers: Lengths | None
    ) -> None:
        self.spec, self.generate, self.batches = spec, generate, batches
        self.examples = Lengths.measure(np.concatenate(batches))
        new = Lengths.all(generate.config.max_new_tokens) if generate else None
        self.answers = answers if generate and answers else new
        self.draws = expect_draws(spec)

    def describe(self, call: Generate | Inference | Train, role: RoleWork) -> CallWork:
        """Returns the work of a call on a role."""
        minibatches = call.minibatches if isinstance(call, Train) else None
        num_updates = call.num_updates if isinstance(call, Train) else 1
        passes = minibatches.passes if minibatches else 1
        gen, num_parts = self.generate, num_updates // passes
        is_generate = isinstance(call, Generate)
        lengths = self.examples if is_generate or self.answers is None else self.examples + self.answers
        head = "logprobs" if isinstance(call, Generate) else call.head
        return CallWork(
            name=call.name,
            role=call.role,
            kind="generate" if is_generate else "inference" if isinstance(call, Inference) else "train",
            model=replace(role.model, cuts=(1,)) if is_generate and call.needs_one_stage else role.model,
            dtype=role.dtype,
            num_sequences=gen.num_answers if gen else round(float(np.mean([len(one) for one in self.batches]))),
            prompts=lengths,
            answers=self.answers if is_generate else None,
            most_new_tokens=gen.config.max_new_tokens if is_generate and gen else None,
            num_updates=num_updates,
            passes=passes,
            pack_fn=self.pack_answers(gen, num_parts) if gen else pack_examples(self.batches),
            scores_vocab=head != "values",
            after=tuple(self.find_sources(call.name)),
            is_ahead=call.name in self.spec.graph.ahead,
            draws=self.draws if self.is_drawn_again(call.name) else 1.0,
            fixed=self.find_fixed(call),
        )

    def pack_answers(self, generate: Generate, num_parts: int) -> PackFn:
        """Returns how answers with their prompts lie in rows, as `pack_rollout` and `make_minibatches` lay them."""
        assert generate.max_seqlen and self.answers
        num_sequences = generate.num_answers // num_parts
        longest, per_prompt, added = generate.max_seqlen, generate.answers_per_prompt, round(self.answers.mean)
        lengths = np.repeat(np.concatenate(self.batches), per_prompt)
        lengths = np.minimum(np.resize(lengths, num_sequences) + added, longest)

        @lru_cache
        def pack(multiple: int) -> tuple[float, int]:
            row_len = rollout_row_len(longest, num_sequences, multiple)
            return bucket_rows(len(pack_rows(lengths, row_len).rows), multiple), row_len

        return pack

    def find_sources(self, call: str) -> list[str]:
        """Returns the model calls of the same step whose results a call needs."""
        names = {mfc.name for mfc in self.spec.graph.mfcs}
        return [one.name for one in self.spec.graph.order if one.name in names & self.ancestors(call)]

    def ancestors(self, call: str) -> set[str]:
        """Returns the calls before a call, host calls among them."""
        return nx.ancestors(self.spec.graph.edges, call)

    def is_drawn_again(self, call: str) -> bool:
        """Returns whether a call works on each draw of prompts: it makes what they are chosen by."""
        if self.spec.sampling is None:
            return False
        judge = self.spec.graph.producers["rewards"]
        return call == judge or call in self.ancestors(judge)

    def find_fixed(self, call: Generate | Inference | Train) -> Fixed:
        """Returns what the user has decided about a call."""
        role, options = self.spec.roles[call.role], self.spec.allocation
        placed = options.calls[call.placement].strategy
        of_call = call.micro_batches if isinstance(call, Inference | Train) else None
        return Fixed(
            strategy=None if placed == ParallelStrategy() else placed,
            devices=read_mesh(options, call.placement),
            zero_stage=None if "zero_stage" in role.undecided else role.zero_stage,
            micro_batches=of_call if of_call and (of_call.count or of_call.max_tokens) else None,
            remat=None if "remat" in role.undecided else role.compute.remat,
            num_slots=call.num_slots if isinstance(call, Generate) else None,
            tail_slots=call.tail_slots if isinstance(call, Generate) else None,
            tail_tp=call.tail_tp if isinstance(call, Generate) else None,
        )


def pack_examples(batches: Sequence[np.ndarray]) -> PackFn:
    """Returns how a dataset's examples lie in rows, as the loader lays them."""

    @lru_cache
    def pack(multiple: int) -> tuple[float, int]:
        shapes = plan_shapes(batches, multiple, max_shapes=3)
        return float(shapes.num_rows.mean()), shapes.row_len

    return pack
