"""The programs of a run's calls from shapes alone: what is lowered is what the runtime would compile and run.

A step is gone through as `runtime.executor` does, with stand-ins for what only a run knows. Answers are as long as they
can be, after prompts as long as the data's longest, and all of them are learned from: of memory and of work this is the
most that a step can take. Batches of files are the run's own, the largest of them.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import NamedSharding
from jax.stages import Compiled, Lowered

from realjax.allocation.plan import AllocationPlan
from realjax.core.axes import Rules, inference_rules, train_rules
from realjax.core.batch import Batch, is_per_segment, is_per_token
from realjax.core.layout import Layout
from realjax.core.trees import Tree, join_trees, map_paths
from realjax.data.loader import Loader
from realjax.dataflow.graph import Call, Generate, Inference, ModelCall, Train
from realjax.dataflow.run import Evaluation, RunSpec
from realjax.engine.admission import SHORTEST_CACHE, Parts, bucket_length, most_needed
from realjax.engine.batching import Generation, Request
from realjax.engine.compiled import abstract_batch
from realjax.engine.slot_arrays import CHUNK_LEN
from realjax.engine.slots import SlotPrograms
from realjax.engine.state import TrainState
from realjax.runtime.calls import PACKING_KEYS, choose_sequences, select_inputs
from realjax.runtime.memory import bytes_held_beside, device_bytes
from realjax.runtime.programs import Programs, num_micro_batches
from realjax.runtime.roles import Role, build_roles
from realjax.runtime.rollouts import make_minibatches, make_requests, pack_rollout
from realjax.runtime.sizes import Sizes

CompileFn = Callable[[Lowered], Compiled]


@dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """A call's program, lowered, and what there is to know of it before it is compiled.

    It runs `runs` times in a step, or in an evaluation if `is_evaluation`. Where it loops for as long as rows are
    running (decode), `turns` are those of the loop in all runs. `held` are bytes of the fullest device that other
    arrays take meanwhile, by name.
    """

    call: str
    name: str  # 'train', 'inference', 'evaluation', or which one of a generate call
    role: str
    options: str  # the name of the options that say how the call runs
    layout: Layout
    num_params: int  # of the role's model on a device, when only tensor and pipeline parallelism split it
    shape: str
    lowered: Lowered
    runs: int
    turns: int = 0
    num_mbs: int = 1
    is_evaluation: bool = False
    held: Mapping[str, int] = field(default_factory=dict)


def lower_run(spec: RunSpec, plan: AllocationPlan, compile_fn: CompileFn) -> Iterator[Program]:
    """Yields the programs of a step's calls in order, then those of an evaluation. Nothing is read but the data.

    `compile_fn` compiles what has to be compiled for its results' places to be known. Raises ValueError for a run that
    the runtime would refuse before its first step.
    """
    run = AbstractRun(spec, plan, compile_fn)
    yield from run.lower(spec.graph.order, largest_batch(plan.loader))
    for name, evaluation in spec.evaluations.items():
        batch = largest_batch(plan.held_out[name])
        if isinstance(evaluation, Evaluation):
            yield from run.lower_evaluation(evaluation, batch)
        else:
            for calls in evaluation.variants.values():
                yield from run.lower(calls, batch, is_evaluation=True)


def largest_batch(loader: Loader) -> Batch:
    """Returns the first of the batches with the most rows."""
    return loader.batch(int(np.argmax(loader.shapes.num_rows)))


class AbstractRun:
    """A run's roles and programs without arrays: every role's state is shapes with shardings."""

    def __init__(self, spec: RunSpec, plan: AllocationPlan, compile_fn: CompileFn) -> None:
        self.spec, self.plan, self.compile_fn = spec, plan, compile_fn
        self.roles = build_roles(spec, plan)
        self.programs, self.sizes = Programs(plan, self.roles, spec.seed), Sizes()
        self.states = {name: role.abstract_state() for name, role in self.roles.items()}
        self.bases: dict[Hashable, Any] = {}  # leaves of what roles with adapters share
        for role in self.roles.values():
            self._base(role, role.home)
        self._kept_width = 0  # of the answers made last

    def lower(self, calls: Sequence[Call], batch: Batch, *, is_evaluation: bool = False) -> Iterator[Program]:
        """Yields the programs of `calls`, which read the batch and what those before them add to it."""
        for call in calls:
            for program in self.lower_call(call, batch):
                yield replace(program, is_evaluation=is_evaluation)
            batch = self.stand_in(call, batch)

    def lower_call(self, call: Call, batch: Batch) -> Iterator[Program]:
        """Yields the programs of one call on a batch of host arrays that has all its inputs."""
        if isinstance(call, Generate):
            yield from self._lower_generate(call, batch)
        elif isinstance(call, Inference):
            yield self._lower_inference(call, batch)
        elif isinstance(call, Train):
            yield self._lower_train(call, batch)

    def lower_evaluation(self, evaluation: Evaluation, batch: Batch) -> Iterator[Program]:
        """Yields the programs that measure a held-out loss: those of the calls that it reads, then its own."""
        yield from self.lower(evaluation.calls, batch, is_evaluation=True)
        for call in evaluation.calls:
            batch = self.stand_in(call, batch)
        home, trained = self.roles[evaluation.role].home, self.spec.graph.train_call(evaluation.role)
        num_mbs, params = num_micro_batches(evaluation, batch, home), self._params(evaluation.role)
        inputs = self._abstract(batch, inference_rules(home.strategy), home)
        yield Program(
            call="evaluation",
            name="evaluation",
            role=evaluation.role,
            options=trained.placement if trained else evaluation.name,
            layout=home,
            num_params=self._num_params(evaluation.role, home),
            shape=_shape(inputs),
            lowered=self.programs.evaluation(evaluation, num_mbs).lower(params, inputs),
            runs=evaluation.loader.total_steps,
            num_mbs=num_mbs,
            is_evaluation=True,
            held=self._held(home, params),
        )

    def stand_in(self, call: Call, batch: Batch) -> Batch:
        """Returns the batch after a call, as the runtime would leave it, its values made up."""
        if isinstance(call, Generate):
            return self._make_answers(call, batch)
        if isinstance(call, Train):
            return batch
        made: dict[str, np.ndarray] = {}
        for key in call.outputs:
            like = batch["tokens"] if is_per_token(key) else next(batch[one] for one in batch if is_per_segment(one))
            made[key] = _all_answers(batch) if key.endswith("_mask") else np.zeros(like.shape, np.float32)
        if isinstance(call, Inference) and call.num_choices is not None:
            shape = (*batch["tokens"].shape, call.num_choices + 1)
            made = {key: np.zeros(shape, np.int32 if key.endswith("_ids") else np.float32) for key in call.outputs}
        return batch.with_arrays(**made)

    def _make_answers(self, mfc: Generate, prompts: Batch) -> Batch:
        num_new = mfc.config.max_new_tokens
        kept = self.programs.slots(mfc).sampler.find_kept_form(self.roles[mfc.role].model.config.vocab_size)
        self._kept_width = 0 if kept is None else kept.width
        requests, routes = _longest_requests(prompts, mfc), self.programs.slots(mfc).routes
        num_tokens = len(requests[0].tokens) + num_new
        answer = Generation(
            tokens=np.zeros(num_new, np.int32),
            logprobs=np.zeros(num_new, np.float32),
            ended=False,
            # One word stands for all of them, which may be gigabytes.
            kept=None if kept is None else np.zeros((num_new, 1), np.int32),
            routes=None if routes is None else np.zeros((num_tokens, routes.width), np.int32),
        )
        shape, sizes = self.plan.rollouts[mfc.name], self.sizes.of(mfc.name)
        return pack_rollout(requests, [answer] * len(requests), mfc, shape, sizes=sizes)

    def _abstract(self, batch: Batch, rules: Rules, layout: Layout) -> Batch:
        if "kept" in batch:
            one = batch["kept"]
            batch = batch.replace_arrays(kept=np.broadcast_to(one[..., :1], (*one.shape[:-1], self._kept_width)))
        return abstract_batch(batch, rules, layout)

    def _lower_train(self, mfc: Train, batch: Batch) -> Program:
        layout, state = self.plan.layouts[mfc.name], self.states[mfc.role]
        if mfc.minibatches is not None:
            batch, *_ = make_minibatches(
                batch.select({*PACKING_KEYS, *mfc.inputs}),
                mfc.minibatches,
                row_multiple=self.plan.row_multiples[mfc.name],
                seed=(self.spec.seed, 0, 0),
                sizes=self.sizes.of(mfc.name),
            )
        batch = select_inputs(mfc, batch, self.sizes.of(mfc.name))
        num_mbs, role = num_micro_batches(mfc, batch, layout), self.roles[mfc.role]
        inputs = self._abstract(batch, train_rules(layout.strategy), layout)
        base = () if role.spec.base is None else (self._base(role, layout),)
        return self._describe(
            mfc,
            (state, base),
            name="train",
            shape=_shape(inputs),
            lowered=self.programs.train_step(mfc, num_mbs).lower(state, inputs, *base),
            runs=mfc.num_updates,
            num_mbs=num_mbs,
        )

    def _lower_inference(self, mfc: Inference, batch: Batch) -> Program:
        layout, sizes = self.plan.layouts[mfc.name], self.sizes.of(mfc.name)
        chosen = choose_sequences(mfc, batch, self.plan.row_multiples[mfc.name], sizes)
        batch = select_inputs(mfc, chosen.batch if chosen else batch, sizes)
        num_mbs, params = num_micro_batches(mfc, batch, layout), self._params_for(mfc)
        inputs = self._abstract(batch, train_rules(layout.strategy), layout)
        return self._describe(
            mfc,
            params,
            name="inference",
            shape=_shape(inputs),
            lowered=self.programs.inference(mfc, num_mbs).lower(params, inputs),
            runs=1,
            num_mbs=num_mbs,
        )

    def _lower_generate(self, mfc: Generate, prompts: Batch) -> Iterator[Program]:
        slots = self.programs.slots(mfc)
        params = slots.abstract_params(self._params_for(mfc), self.compile_fn)
        longest, num_new = _longest_prompt(mfc), mfc.config.max_new_tokens
        length = min(bucket_length(longest + num_new - 1, SHORTEST_CACHE), most_needed(longest, mfc.config))
        parts, entries = Parts.of(slots), [request.enter() for request in _longest_requests(prompts, mfc)]
        admission = parts.admit(entries[: parts.count_rows(range(slots.num_slots))], range(slots.num_slots))
        lowered = slots.lower(params, length, admission.prompts, has_greedy=mfc.has_baseline)
        turns = math.ceil(mfc.num_answers / slots.num_slots) * num_new
        runs = {"admit": math.ceil(mfc.num_answers / slots.num_admitted), "decode": math.ceil(turns / CHUNK_LEN)}
        for name, one in lowered.items():
            yield self._describe(
                mfc,
                params,
                name=name,
                shape=f"{slots.num_slots} slots x {length} tokens",
                lowered=one,
                runs=runs[name],
                turns=turns if name == "decode" else 0,
            )
        if (tail := self.programs.tail(mfc)) is not None:
            yield self._lower_tail(mfc, params, tail.programs, length)

    def _lower_tail(self, mfc: Generate, params: Tree, slots: SlotPrograms, length: int) -> Program:
        """Returns the program that the last answers go on with: one chunk of it, since those here are all as long."""
        place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        moved = jax.tree.map(place, params, slots.list_places())
        program = self._describe(
            mfc,
            params,
            name="decode the last",
            shape=f"{slots.num_slots} slots x {length} tokens",
            lowered=slots.lower(moved, length, None, has_greedy=mfc.has_baseline)["decode"],
            runs=1,
        )
        beside = bytes_held_beside((), params, slots.layout.devices)
        return replace(program, layout=slots.layout, held={**program.held, f"{mfc.role}: before the move": beside})

    def _describe(self, mfc: ModelCall, given: object, **rest: Any) -> Program:
        """Returns a program of a call that is given these of the role's arrays."""
        layout = self.plan.layouts[mfc.name]
        return Program(
            call=mfc.name,
            role=mfc.role,
            options=mfc.placement,
            layout=layout,
            num_params=self._num_params(mfc.role, layout),
            held=self._held(layout, given),
            **rest,
        )

    def _num_params(self, role: str, layout: Layout) -> int:
        return self.roles[role].model.num_params // (layout.strategy.tp * layout.strategy.pp)

    def _own(self, role: str) -> Tree:
        state = self.states[role]
        return state.params if isinstance(state, TrainState) else state

    def _params(self, role: str) -> Tree:
        return join_trees(self._base(self.roles[role], self.roles[role].home), self._own(role))

    def _base(self, role: Role, layout: Layout) -> Tree:
        """Returns the parameters in a layout that a role has in common with others, one array for each of these."""
        if role.spec.base is None:
            return {}

        def one(path: str, leaf: jax.ShapeDtypeStruct, place: NamedSharding) -> jax.ShapeDtypeStruct:
            dtype = role.model.copy_dtype(path, role.compute.array_dtype)
            made = jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=place)
            return self.bases.setdefault((role.spec.base, path, leaf.shape, dtype, place), made)

        return map_paths(one, role.frozen, role.frozen_shardings(layout))

    def _params_for(self, mfc: ModelCall) -> Tree:
        """Returns what the call reads as parameters: those at home, or a copy of its own."""
        role, own, layout = self.roles[mfc.role], self._own(mfc.role), self.plan.layouts[mfc.name]
        base = self._base(role, layout)
        if isinstance(mfc, Generate) and role.spec.merges_adapters:
            return base
        if (shardings := role.copy_shardings(layout)) is None:
            return join_trees(base, own)
        dtypes = role.model.copy_dtypes(role.compute.array_dtype)
        copy = lambda _, x, place, dtype: jax.ShapeDtypeStruct(x.shape, dtype, sharding=place)
        return join_trees(base, map_paths(copy, own, shardings, dtypes))

    def _held(self, layout: Layout, given: object) -> dict[str, int]:
        """Returns what the fullest device of a layout holds of the roles' states, but for the arrays `given`."""
        own = {id(leaf) for leaf in jax.tree.leaves(given)}
        parts: dict[str, Sequence[Array]] = {}
        for name, state in self.states.items():
            for what, tree in _split_state(self.roles[name], state).items():
                parts[f"{name}: {what}"] = [leaf for leaf in jax.tree.leaves(tree) if id(leaf) not in own]
        parts["base"] = [leaf for leaf in self.bases.values() if id(leaf) not in own]
        by_device = ({what: device_bytes(part, device) for what, part in parts.items()} for device in layout.devices)
        fullest = max(by_device, key=lambda held: sum(held.values()))
        return {what: size for what, size in fullest.items() if size}


def _all_answers(batch: Batch) -> np.ndarray:
    """Returns the mask of the most that can be learned from: all that was answered, but for what is never learned."""
    mask = batch["loss_mask"].copy()
    for key in ("is_baseline", "is_other"):
        if key in batch:
            # Segments count from 1; 0 is padding.
            of_segments = np.pad(batch[key], ((0, 0), (1, 0)))
            mask &= ~np.take_along_axis(of_segments, batch["segment_ids"], axis=1)
    return mask


def _split_state(role: Role, state: TrainState | Tree) -> dict[str, object]:
    if isinstance(state, TrainState):
        return {"masters": state.params, "moments": (state.opt_state, state.num_updates, state.num_skipped)}
    return {} if role.is_offloaded else {"parameters": state}


def _longest_prompt(mfc: Generate) -> int:
    assert mfc.max_seqlen, f"{mfc.name}: a generate call says how long answers can be"
    return mfc.max_seqlen - mfc.config.max_new_tokens


def _longest_requests(prompts: Batch, mfc: Generate) -> list[Request]:
    """Returns the requests of a batch, of prompts that are all the longest and all different."""
    requests = make_requests(prompts, mfc, step=0)
    of_prompt = lambda number: np.full(_longest_prompt(mfc), number // mfc.answers_per_prompt, np.int32)
    return [replace(request, tokens=of_prompt(number)) for number, request in enumerate(requests)]


def _shape(batch: Batch) -> str:
    rows, tokens = batch["tokens"].shape
    return f"{rows} rows x {tokens}"
