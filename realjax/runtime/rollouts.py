"""Rollouts: from prompts to requests, from their continuations to packed sequences, and on to minibatches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from realjax.allocation.plan import RolloutShape
from realjax.core.batch import Batch, is_per_token
from realjax.core.segments import segment_slices
from realjax.data.packing import PackPlan, pack, pack_rows, target_indices, unpack
from realjax.dataflow.graph import Generate, Minibatches
from realjax.engine.batching import Generation, Request
from realjax.runtime.sizes import LEAST, LeastSizes


def make_requests(prompts: Batch, mfc: Generate, step: int) -> list[Request]:
    """Returns the requests of a packed batch of prompts: each prompt's samples one after the other, its baseline last.

    Their randomness follows from the prompt's `prompt_id` and the number of its sample, which no other step
    has, unless the call repeats itself.
    """
    num_seen: dict[int, int] = {}
    requests = []
    for prompt in unpack(prompts):
        row_id = int(prompt["prompt_id"])
        # A batch that straddles two epochs may hold a prompt twice.
        occurrence = num_seen.setdefault(row_id, 0)
        num_seen[row_id] += 1
        first = 0 if mfc.repeats else (2 * step + occurrence) * mfc.num_samples
        tokens = np.asarray(prompt["tokens"])
        for sample in range(mfc.num_samples):
            requests.append(Request(tokens=tokens, row_id=row_id, sample_id=first + sample))
        if mfc.has_baseline:
            requests.append(Request(tokens=tokens, row_id=row_id, is_greedy=True))
    return requests


def answer_requests(
    requests: Sequence[Request], mfc: Generate, draw_fn: Callable[[list[Request]], list[Generation]]
) -> list[Generation]:
    """Returns the continuation of each request: the answer that is given, else one that `draw_fn` draws.

    Of a given answer no log-probabilities are known, which are 0 then.
    """
    find = mfc.given_fn or (lambda row_id, sample_id: None)
    given = [find(request.row_id, request.sample_id) for request in requests]
    left = [request for request, tokens in zip(requests, given, strict=True) if tokens is None]
    drawn = iter(draw_fn(left) if left else [])
    wrap = lambda tokens: Generation(
        tokens=tokens, logprobs=np.zeros(len(tokens), np.float32), ended=int(tokens[-1]) in mfc.eos_ids, kept=None
    )
    return [next(drawn) if tokens is None else wrap(tokens) for tokens in given]


def pack_rollout(
    requests: Sequence[Request],
    generations: Sequence[Generation],
    mfc: Generate,
    shape: RolloutShape,
    ages: Sequence[np.ndarray] | None = None,
    sizes: LeastSizes = LEAST,
    extras: Sequence[dict[str, np.ndarray]] | None = None,
) -> Batch:
    """Returns the packed batch of whole sequences: a response's tokens, log-probabilities and kept sets after its
    prompt, experts of both, and what each sequence is. `group` numbers the prompts of the batch. `ages` are those of
    the responses' tokens, for the key `token_age`; `extras` more keys of each sequence, or others for those.
    """
    num_samples = mfc.answers_per_prompt
    examples = []
    for i, (request, generation) in enumerate(zip(requests, generations, strict=True)):
        num_prompt, num_new = len(request.tokens), len(generation.tokens)
        after_prompt = lambda x, n=num_prompt: np.pad(x, ((n, 0), *[(0, 0)] * (x.ndim - 1)))
        example = {
            "tokens": np.concatenate([request.tokens, generation.tokens]),
            "loss_mask": after_prompt(np.ones(num_new, np.bool_)),
            "logprobs": after_prompt(generation.logprobs),
            "has_eos": np.array(generation.ended),
            "prompt_id": np.array(request.row_id, np.int32),
            "group": np.array(i // num_samples, np.int32),
            "sample_id": np.array(i % num_samples, np.int32),
        }
        if mfc.has_baseline:
            example["is_baseline"] = np.array(request.is_greedy)
        if ages is not None:
            example["token_age"] = after_prompt(ages[i])
        if generation.routes is not None:
            example["routes"] = generation.routes
        examples.append(example if extras is None else example | extras[i])
    plan = plan_rollout(examples, shape, sizes)
    batch = pack(examples, plan, num_segments=sizes.segments(plan.num_segments))
    kept = [generation.kept for generation in generations]
    return batch if kept[0] is None else batch.with_arrays(kept=_place_kept(kept, plan))


def plan_rollout(examples: Sequence[dict[str, np.ndarray]], shape: RolloutShape, sizes: LeastSizes = LEAST) -> PackPlan:
    """Returns where the sequences of a rollout go."""
    num_rows = sizes.rows([_lengths(examples)], shape.row_len, shape.row_multiple)
    return _plan(examples, shape.row_len, num_rows, shape.row_multiple)


def _place_kept(kept: Sequence[np.ndarray | None], plan: PackPlan) -> np.ndarray:
    """Returns the sets `[N, W]` of responses at the ends of their sequences, `[R, T, W]`.

    They are most of what a batch holds, and are copied once.
    """
    arrays = [array for array in kept if array is not None]
    assert len(arrays) == len(plan.lengths), "of one call, all responses have sets, or none"
    placed = np.zeros((len(plan.rows), plan.row_len, arrays[0].shape[1]), arrays[0].dtype)
    for index, row, _, tokens in plan.places():
        placed[row, tokens.stop - len(arrays[index]) : tokens.stop] = arrays[index]
    return placed


def make_minibatches(
    rollout: Batch,
    minibatches: Minibatches,
    *,
    row_multiple: int,
    seed: tuple[int, ...],
    sizes: LeastSizes = LEAST,
) -> list[Batch]:
    """Returns the minibatches of one pass over a batch of host arrays, all of one shape.

    Each has the same number of sequences, give or take one, and about as many tokens: sequences of about one length go
    to different minibatches. Sequences without a token to train on (`train_mask`) are left out; where too few are left,
    there are fewer minibatches, or none.
    """
    # In an order of their own: how they are packed differs between layouts.
    sequences = sorted(unpack(rollout), key=lambda sequence: sequence["tokens"].tobytes())
    if "train_mask" in rollout:
        sequences = [sequence for sequence in sequences if sequence["train_mask"].any()]
    if not sequences:
        return []
    rng = np.random.default_rng(seed if minibatches.shuffle else 0)
    noise = rng.random(len(sequences)) * minibatches.shuffle
    order = np.lexsort((noise, np.array([-len(sequence["tokens"]) for sequence in sequences])))
    parts: list[list[int]] = [[] for _ in range(min(minibatches.count, len(sequences)))]
    for start in range(0, len(order), len(parts)):
        deal = order[start : start + len(parts)]
        turn = rng.permutation(len(parts))
        for part, index in zip(turn, deal, strict=False):
            parts[part].append(int(index))
    chosen = [[sequences[i] for i in sorted(part)] for part in parts]
    num_rows = sizes.rows([_lengths(part) for part in chosen], rollout.row_len, row_multiple)
    plans = [_plan(part, rollout.row_len, num_rows, row_multiple) for part in chosen]
    num_segments = sizes.segments(max(plan.num_segments for plan in plans))
    return [pack(part, plan, num_segments=num_segments) for part, plan in zip(chosen, plans, strict=True)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Chosen:
    """Some sequences of a batch, in rows of their own."""

    batch: Batch
    places: tuple[tuple[tuple[int, slice], tuple[int, slice]], ...]  # of each sequence: in that batch, and in the other

    @classmethod
    def of(cls, batch: Batch, key: str, row_multiple: int, sizes: LeastSizes = LEAST) -> "Chosen":
        """Returns the sequences of a batch of host arrays for which `key` `[R, S]` is True."""
        found = [place for place in segment_slices(batch["segment_ids"]) if batch[key][place[0], place[1]]]
        arrays = {name: batch[name] for name in batch if name not in ("segment_ids", "positions")}
        examples = [
            {name: array[row, tokens if is_per_token(name) else segment] for name, array in arrays.items()}
            for row, segment, tokens in found
        ]
        num_rows = sizes.rows([_lengths(examples)], batch.row_len, row_multiple)
        plan = _plan(examples, batch.row_len, num_rows, row_multiple)
        before = [(row, tokens) for row, _, tokens in found]
        places = tuple(((row, tokens), before[index]) for index, row, _, tokens in plan.places())
        return cls(batch=pack(examples, plan), places=places)

    def put_back(self, output: np.ndarray, num_rows: int) -> np.ndarray:
        """Returns an output `[R', T, ...]` of the chosen sequences in the rows that they came from, 0 elsewhere."""
        whole = np.zeros((num_rows, *output.shape[1:]), output.dtype)
        for (row, tokens), (row_before, tokens_before) in self.places:
            whole[row_before, tokens_before] = output[row, tokens]
        return whole


def _lengths(examples: Sequence[dict[str, np.ndarray]]) -> list[int]:
    return [len(example["tokens"]) for example in examples]


def _plan(examples: Sequence[dict[str, np.ndarray]], row_len: int, num_rows: int, num_shards: int) -> PackPlan:
    return pack_rows(_lengths(examples), row_len, num_rows=num_rows, num_shards=num_shards)


def list_targets(mask: np.ndarray, positions: np.ndarray, sizes: LeastSizes = LEAST) -> np.ndarray | None:
    """Returns the row indices `[R, P]` of the tokens of a mask `[R, T]`, see `data.packing.target_indices`."""
    is_target, row_len = mask & (positions > 0), mask.shape[1]
    # A row begins with a sequence, and a sequence with tokens that nobody asks about.
    most = row_len - int(positions.min(initial=row_len, where=is_target))
    return target_indices(mask, positions, sizes.targets(int(is_target.sum(axis=1).max()), row_len, most))
