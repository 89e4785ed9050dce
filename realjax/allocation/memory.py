"""What calls and the models between them take of a device's memory, before anything is compiled.

A device holds what lives there between the calls (`home_memory` of each role that does), and, while a call runs, what
the call adds (`call_memory`). Calls that share a device never run at once, so its peak is the sum of the homes and the
largest call. All figures are of the fullest device, counted with the table of `core.axes`; what XLA keeps of a layer
while it computes it has factors that were read off compiled programs (`tools.bench.memory_model`). These are programs
for accelerators that hold no attention scores; CPUs take more.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from realjax.allocation.choice import Choice
from realjax.allocation.prediction import GIB
from realjax.allocation.shapes import count_slots
from realjax.allocation.terms.split import LayerBytes, Split, item_bytes
from realjax.allocation.workload import CallWork, ModelShape, RoleWork

# How far below the compiler's figure the model may be. What has to fit should fit with this share more.
MARGIN = 0.08
FLOAT32 = 4

# As `models.heads`, `reshard.apply`, `engine.admission` and `engine.batching` have them; a test compares.
LOGITS_BYTES, MOVED_BYTES = 2**28, 2**28
SHORTEST_PROMPTS, SHORTEST_CACHE = 32, 128
ROOM = 4  # of cuDNN's backward pass: float32 numbers for each of the queries'


class DoesNotFitError(ValueError):
    """Nothing that may be chosen fits into the memory of the devices; the message says what lacks, and what helps."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of the fullest device, by what they are for."""

    terms: Mapping[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.terms.values())

    def __str__(self) -> str:
        return ", ".join(f"{name.replace('_', ' ')} {size / GIB:.2f}" for name, size in self.terms.items())


def split_model(model: ModelShape, choice: Choice) -> Split:
    """Returns a model as a choice splits it."""
    return Split.of(model, choice.strategy, choice.expert_shards)


def home_memory(role: RoleWork, work: CallWork | None, choice: Choice) -> Memory:
    """Returns what of a role stays on each device of its home between calls.

    `choice` is of the call it lives with, `work`. Of a trained role (Adam, arXiv:1412.6980) float32 masters and two
    moments, 12 bytes a parameter, split over `data` from ZeRO stage 1 on (arXiv:1910.02054), with adapters of these
    alone; of another its parameters in its dtype, float32 where they follow a trained role; nothing where
    `role.offload` is True, not where it is open.
    """
    split = split_model(role.model, choice)
    if role.is_beside:
        return _memory()
    if role.trained_share < 1:
        base = split.params(is_sharded=choice.strategy.zero_stage == 3) * item_bytes(role.dtype)
        masters = _adapters(role, choice, is_sharded=choice.strategy.zero_stage > 0) * FLOAT32 * role.is_trained
        return _memory(parameters=base, masters=masters, moments=2 * masters)
    if role.is_trained:
        masters = split.params(is_sharded=choice.strategy.zero_stage > 0) * FLOAT32
        return _memory(masters=masters, moments=2 * masters)
    if role.offload:
        return _memory()
    size = FLOAT32 if role.is_averaged else item_bytes(role.dtype)
    return _memory(parameters=split.params(is_sharded=choice.strategy.zero_stage == 3) * size)


def _adapters(role: RoleWork, choice: Choice, *, is_sharded: bool = False) -> float:
    """Returns the numbers of a role's adapters on a device, about: of their two sides one has the model's width, which
    ZeRO splits, and one that of heads or the feed-forward, which `tensor` splits.
    """
    s = choice.strategy
    return role.trained_share * role.model.num_params / s.pp * (1 / (s.dp if is_sharded else 1) + 1 / s.tp) / 2


def call_memory(work: CallWork, role: RoleWork, choice: Choice, *, at_home: bool) -> Memory:
    """Returns what a call adds to the homes while it runs; `at_home`: it has the layout of its role's home, and that
    is not offloaded.

    A call elsewhere has a copy of the parameters in its own dtype, and moving it needs room for a chunk beside it.
    """
    return _CALLS[work.kind](work, role, choice, at_home)


def _train_memory(work: CallWork, role: RoleWork, choice: Choice, at_home: bool) -> Memory:
    split, s, size = split_model(work.model, choice), choice.strategy, item_bytes(work.dtype)
    params, rows = split.params(is_sharded=s.zero_stage == 3), MicroBatch.of(work, choice)
    trained = params if role.trained_share == 1 else _adapters(role, choice)
    # Float32 masters that lie as the layers use them are read themselves.
    is_copied = size != FLOAT32 or s.zero_stage in (1, 2)
    layer = LayerBytes(
        split=split,
        tokens=rows.tokens,
        size=size,
        is_gathered=s.zero_stage == 3 and s.dp > 1,
        is_added=choice.num_mbs * rows.num_parts > 1,
        is_stage=s.pp > 1,
    )
    return _memory(
        compute_copy=trained * size if is_copied else 0,
        gradients=trained * FLOAT32,
        kept=_num_kept(choice) * split.num_layers * (layer.kept_remat if choice.remat else layer.kept_whole),
        layer=max(layer.backward, _head_bytes(work, split, rows)),
        tied_head=size * split.outer if work.model.is_tied and work.scores_vocab else 0,
        attention_scratch=ROOM * FLOAT32 * rows.tokens * split.queries,
        batch=rows.batch_bytes,
    )


def _num_kept(choice: Choice) -> int:
    """Returns the micro-batches of which a device keeps what the backward pass reads.

    In 1F1B (arXiv:2104.04473) as the engine runs it at most 2P - 1 are on their way through P stages; the one that
    comes or goes lies beside them.
    """
    return 2 * choice.strategy.pp if choice.strategy.pp > 1 else 1


def _infer_memory(work: CallWork, role: RoleWork, choice: Choice, at_home: bool) -> Memory:
    split, s, size = split_model(work.model, choice), choice.strategy, item_bytes(work.dtype)
    params, rows = split.params(is_sharded=s.zero_stage == 3) * size, MicroBatch.of(work, choice)
    # At home a copy is cast, if what lives there is wider.
    is_cast = at_home and (role.is_trained or role.is_averaged) and size != FLOAT32 and role.trained_share == 1
    layer = LayerBytes(split=split, tokens=rows.tokens, size=size).forward
    if s.pp > 1:
        # Stages hand out what each of their parts becomes; the head reads all of it.
        rows = replace(rows, tokens=rows.tokens * rows.num_parts, num_parts=1)
        layer += 1.5 * rows.tokens * split.hidden * size
    # Before that, ZeRO's shards are gathered into the copy, a stack of layers at a time.
    gathered = split.largest_stack * size if is_cast and s.zero_stage in (1, 2) and s.dp > 1 else 0
    program = {
        "compute_copy": params if is_cast else 0,
        "layer": max(layer, _head_bytes(work, split, rows), gathered),
        "batch": rows.batch_bytes,
    }
    return _memory(**program, **_arrivals(0 if at_home else params, min(MOVED_BYTES, params), program))


def _generate_memory(work: CallWork, role: RoleWork, choice: Choice, at_home: bool) -> Memory:
    """The larger of the two programs: `admit` runs a quarter of the slots' prompts and writes their keys and values,
    `decode` carries the cache, which has room for the longest sequence, in powers of two.
    """
    assert work.answers is not None, f"{work.name}: a generate call says how long answers can be"
    split, size, s = split_model(work.model, choice), item_bytes(work.dtype), choice.strategy
    num_slots, prompts = count_slots(work, choice), work.prompts.longest
    # Keys and values of a row with room for so many tokens.
    cached = lambda length: 2 * split.keys * size * split.num_layers * work.model.mean_places(length)
    admitted, bucket = max(1, num_slots // 4 // s.row_multiple) * s.pp, _bucket(prompts, SHORTEST_PROMPTS)
    layer = LayerBytes(split=split, tokens=admitted * bucket // s.pp, size=size)
    # Some are there as they were made too. In stages each of 2P - 1 ticks makes some, and P of them are put in order.
    prompt_caches = cached(bucket) * admitted * (1.25 if s.pp == 1 else (2 * s.pp - 1) / s.pp + 1)
    cache = num_slots / s.dp * cached(cache_length(prompts, work.most_new_tokens or work.answers.longest))
    decode = FLOAT32 * 4 * num_slots / s.dp * split.vocab
    if s.pp > 1:
        # In front of the loop XLA turns the kernels of queries, keys and values, and the values of one of P waves.
        decode += split.num_layers * split.hidden * (split.queries + 2 * split.keys) * size + cache / (2 * s.pp)
    # At home the layers' stack is cut into layers: a copy. Table and head are read where they lie, if of the dtype.
    is_copied = not at_home or role.is_trained or role.is_averaged
    params = (split.params() if is_copied else split.layers) * size
    program = {"cache": cache, "admit_or_decode": max(layer.forward + prompt_caches, decode)}
    if (tail := choice.tail) is not None:
        # A part of the parameters that is cut out beside them; most of the cache has gone by then.
        program["tail"] = split_model(work.model, tail).params() * size
    # Stacks are cut as they arrive, so that the largest is there twice, and the next on its way.
    stack = 2 * split.largest_stack * size
    return _memory(**program, **_arrivals(params, stack + (0 if at_home else min(MOVED_BYTES, params)), program))


def _arrivals(params: float, beside: float, program: Mapping[str, float]) -> dict[str, float]:
    """Returns a call's own copy of the parameters, and what is beside it while it arrives, as far as that is more than
    the program takes afterwards.
    """
    return {"parameters": params, "reallocation": max(0, beside - sum(program.values())) if params else 0}


_CALLS = {"train": _train_memory, "inference": _infer_memory, "generate": _generate_memory}


def _memory(**terms: float) -> Memory:
    return Memory(terms={name: int(size) for name, size in terms.items() if size})


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The rows of a micro-batch on a device; they go through the pipeline's stages in `num_parts` parts."""

    num_rows: int
    row_len: int
    num_parts: int
    tokens: float  # of a part
    batch_bytes: int  # of an update's rows: some eight arrays of 4 bytes a token

    @classmethod
    def of(cls, work: CallWork, choice: Choice) -> "MicroBatch":
        """Returns that of a batch of the mean number of rows, cut as `engine.pipeline` cuts it."""
        pp = choice.strategy.pp
        multiple = choice.strategy.row_multiple * choice.num_mbs
        mean_rows, row_len = work.pack_fn(multiple)
        num_rows = math.ceil(mean_rows / multiple) * pp
        num_parts = next(n for n in range(2 * pp, 0, -1) if num_rows % n == 0) if pp > 1 else 1
        return cls(
            num_rows=num_rows,
            row_len=row_len,
            num_parts=num_parts,
            tokens=num_rows * row_len / num_parts / choice.context,
            batch_bytes=8 * 4 * num_rows * choice.num_mbs * row_len,
        )


def _head_bytes(work: CallWork, split: Split, rows: MicroBatch) -> float:
    """Returns the most that the head takes of a part's rows: the logits of a chunk of each row in float32, in training
    as much twice for their gradient, and hidden states whole along the row. A critic's reads them in float32.
    """
    hidden = rows.tokens * split.hidden * item_bytes(work.dtype)
    if not work.scores_vocab:
        return hidden + rows.tokens * split.hidden * FLOAT32
    of_token = split.vocab * FLOAT32
    # A chunk has a token of each row at least, of each part of it under sequence parallelism.
    least = rows.num_rows / rows.num_parts * split.row_parts * of_token
    logits = min(max(LOGITS_BYTES, least), rows.tokens * of_token)
    return 3 * logits + 2 * hidden if work.kind == "train" else logits + hidden


def cache_length(prompt: int, num_new: int) -> int:
    """Returns the tokens that a slot gets room for in the end, of the longest prompt and answer."""
    needed = _bucket(prompt, SHORTEST_PROMPTS) + -(-num_new // SHORTEST_CACHE) * SHORTEST_CACHE
    return min(_bucket(prompt + num_new - 1, SHORTEST_CACHE), needed)


def _bucket(num_tokens: int, shortest: int) -> int:
    """Returns `shortest` times the power of two that is enough."""
    return shortest << max(0, math.ceil(math.log2(num_tokens / shortest)))


@dataclass(frozen=True, kw_only=True)
class Change:
    """Another choice for a call, in the words of its options, and the bytes a device that it saves."""

    text: str
    choice: Choice
    saves: int


def smallest_change(work: CallWork, role: RoleWork, choice: Choice, *, at_home: bool, excess_bytes: int) -> str:
    """Returns in words what to change of a call so that its devices hold so many bytes less; or that nothing does."""
    change = find_smallest_change(work, role, choice, at_home=at_home, excess_bytes=excess_bytes)
    if change.saves >= excess_bytes:
        return f"{work.name}: {change.text}, which saves {change.saves / GIB:.1f} GiB a device"
    most = f"; the most, {change.text}, saves {change.saves / GIB:.1f}" if change.saves else ""
    return f"{work.name}: more devices; no option of it saves {excess_bytes / GIB:.1f} GiB a device{most}"


def find_smallest_change(work: CallWork, role: RoleWork, choice: Choice, *, at_home: bool, excess_bytes: int) -> Change:
    """Returns the change that saves so many bytes with the fewest options, of these the cheapest in time; where none
    does, the one that saves most.

    What a call's home holds counts where it runs there: a higher ZeRO stage or more tensor parallelism makes it less.
    """

    def total(choice: Choice) -> int:
        home = home_memory(role, work, choice).bytes if at_home else 0
        return home + call_memory(work, role, choice, at_home=at_home).bytes

    now, best = total(choice), Change(text="none", choice=choice, saves=0)
    alternatives = [[{}, *options] for options in _list_options(work, choice)]
    # By how many options are changed, then by the cheapest of them.
    order = lambda parts: (sum(map(bool, parts)), [not part for part in parts])
    combined = sorted(itertools.product(*alternatives), key=order)
    for parts in combined[1:]:
        values = {name: value for part in parts for name, value in part.items()}
        saves = now - total(changed := _apply(choice, values))
        if saves > best.saves:
            best = Change(text=_describe_change(values), choice=changed, saves=saves)
        if saves >= excess_bytes:
            return Change(text=_describe_change(values), choice=changed, saves=saves)
    return best


def _list_options(work: CallWork, choice: Choice) -> Iterator[list[dict[str, Any]]]:
    """Yields what could be changed, the cheapest in time first, each with its values, the smallest change first."""
    s, model = choice.strategy, work.model
    if work.kind == "generate":
        halves = (count_slots(work, choice) >> n for n in range(1, 21))
        yield [{"num_slots": number} for number in halves if number and number % s.row_multiple == 0]
        yield [{"tail_slots": 0}] if choice.tail else []
    else:
        most = MicroBatch.of(work, choice).num_rows // s.pp
        yield [{"num_mbs": choice.num_mbs << n} for n in range(1, most.bit_length())]
    if work.kind == "train":
        yield [] if choice.remat else [{"remat": True}]
        yield [{"zero_stage": stage} for stage in (2, 3) if s.dp > 1 and stage > s.zero_stage]
    sizes = (model.num_q_heads, model.ffn_size, model.vocab_size)
    shared = (n for n in range(s.ep + 1, s.dp + 1) if model.num_experts % n == 0 == s.dp % n)
    yield [{"ep": n} for n in shared]
    wider = (n for n in (2, 4, 8) if s.dp % (n * s.ep) == 0 and not any(size % (s.tp * n) for size in sizes))
    yield [{"dp": s.dp // n, "tp": s.tp * n} for n in wider]


def _apply(choice: Choice, values: Mapping[str, Any]) -> Choice:
    own = {name: value for name, value in values.items() if name in ("num_mbs", "remat", "num_slots", "tail_slots")}
    strategy = replace(choice.strategy, **{name: value for name, value in values.items() if name not in own})
    return replace(choice, strategy=strategy, **own)


def _describe_change(values: Mapping[str, Any]) -> str:
    """Returns options and their values, as a command spells them."""
    return " ".join(f"{_OPTIONS[name]}={value}" for name, value in values.items())


_OPTIONS = {
    "num_mbs": "n_mbs",
    "num_slots": "gen.num_slots",
    "tail_slots": "gen.tail_slots",
    "remat": "gradient_checkpointing",
    "zero_stage": "zero_stage",
    "dp": "data_parallel_size",
    "tp": "model_parallel_size",
    "ep": "expert_parallel_size",
}
