"""The last rows of a call: at a chunk's border they go on in fewer slots, where more devices share each layer.

A device with slots of its own reads all its parameters for every token, be it of one row or of many. When few rows are
left, the same devices share the layers instead, and each reads a part. Nothing is gathered for that: each device cuts
its new part out of the parameters that it holds, and a row's keys and values go to the devices that share it, each its
heads. Dynamic tensor parallelism while answers end: PAT, arXiv:2605.23945.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from realjax.core.trees import Tree
from realjax.engine.admission import Entry
from realjax.engine.cached_model import Cache
from realjax.engine.compiled import place_array
from realjax.engine.rows import take_rows
from realjax.engine.sampling import A
from realjax.engine.slot_arrays import Slots
from realjax.engine.slots import SlotPrograms

# move_fn(tree, places, free_source) -> the tree of arrays in a tree of shardings, and the bytes that went from device
# to device; each source may be freed as soon as it is read.
MoveFn = Callable[[Any, Any, bool], tuple[Any, int]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LeftRows(Generic[A]):
    """What the host knows of the rows in B slots; of free ones, 0."""

    lengths: A  # [B] tokens in the cache
    last_tokens: A  # [B]
    num_generated: A  # [B]
    is_running: A  # [B]
    row_ids: A  # [B]
    sample_ids: A  # [B]
    is_greedy: A  # [B]
    texts: A | None  # [B, room] the tokens in the cache, where proposals are looked up


class Tail:
    """Where the last rows of a call go on: `programs` of fewer slots on the devices of `source`."""

    def __init__(self, source: SlotPrograms, programs: SlotPrograms, move_fn: MoveFn) -> None:
        """Raises ValueError for slots that cannot be shared out, or a layout that is not one of the source's devices in
        which more of them share each layer.
        """
        self.source, self.programs, self.move_fn = source, programs, move_fn
        self.num_parts, num_slots = source.layout.strategy.dp, programs.num_slots
        layout = source.layout.share_layers(programs.layout.strategy.tp)
        if layout != programs.layout or num_slots % self.num_parts or num_slots >= source.num_slots:
            raise ValueError(
                f"generate: the last rows of {source.num_slots} slots on {source.layout} were to go on in {num_slots} "
                f"on {programs.layout}; they can on {layout}, in fewer slots, a multiple of {self.num_parts}"
            )
        self.bytes_moved = 0  # from device to device, by all moves
        self.slots_per_part = num_slots // self.num_parts
        self._take = jax.jit(self._take_rows, out_shardings=source.cached.cache_sharding)
        self._go_on = jax.jit(self._fill_slots, static_argnums=2, donate_argnums=0, out_shardings=programs.places)

    def fits(self, slots: Iterable[int]) -> bool:
        """Returns whether the rows in these slots can move: no part of the source has more than its share."""
        return max(Counter(map(self._find_part, slots)).values(), default=0) <= self.slots_per_part

    def move(self, params: Tree, slots: Slots, rows: Mapping[int, Entry]) -> tuple[Tree, Slots, dict[int, int]]:
        """Returns parameters and slots for `programs`, and which slot has become which, of `rows` by slot.

        The slots are given up, the parameters stay, in the form that `prepare` has given them. Every process with a
        device of the layout must call this.
        """
        has_greedy = slots.is_greedy is not None
        index = np.zeros((self.num_parts, self.slots_per_part), np.int32)
        moved = dict[int, int]()
        for slot in sorted(rows):
            part = self._find_part(slot)
            place = sum(self._find_part(other) == part for other in moved)
            index[part, place] = slot % (self.source.num_slots // self.num_parts)
            moved[slot] = part * self.slots_per_part + place
        room = None if slots.texts is None else slots.texts.shape[1]
        cache = self._take(slots.cache, place_array(index.reshape(-1), self.source.places.lengths))
        jax.tree.map(lambda x: x.delete(), slots)
        place = self.programs.cached.cache_sharding
        cache, of_cache = self.move_fn(cache, jax.tree.map(lambda _: place, cache), True)
        params, of_params = self.move_fn(params, self.programs.list_places(), False)
        self.bytes_moved += of_cache + of_params
        left = self._describe({moved[slot]: entry for slot, entry in rows.items()}, room)
        left = jax.tree.map(lambda x: place_array(x, self.programs.layout.replicated), left)
        return params, self._go_on(cache, left, has_greedy), moved

    def _find_part(self, slot: int) -> int:
        return slot // (self.source.num_slots // self.num_parts)

    def _take_rows(self, cache: Cache, index: Array) -> Cache:
        return take_rows(cache, index, self.num_parts)

    def _describe(self, rows: Mapping[int, Entry], room: int | None) -> LeftRows[np.ndarray]:
        """Returns rows by slot as arrays, with texts where there is `room` for them."""
        texts = None if room is None else np.zeros((self.programs.num_slots, room), np.int32)
        if texts is not None:
            for slot, row in rows.items():
                texts[slot, : len(row.tokens) - 1] = row.tokens[:-1]

        def fill(values: Mapping[int, int]) -> np.ndarray:
            filled = np.zeros(self.programs.num_slots, np.int32)
            filled[list(values)] = list(values.values())
            return filled

        of = lambda get: fill({slot: get(row) for slot, row in rows.items()})
        return LeftRows(
            lengths=of(lambda row: len(row.tokens) - 1),  # the last one is still to be put in
            last_tokens=of(lambda row: row.tokens[-1]),
            num_generated=of(lambda row: row.num_generated),
            is_running=of(lambda row: 1).astype(np.bool_),
            row_ids=of(lambda row: row.row_id),
            sample_ids=of(lambda row: row.sample_id),
            is_greedy=of(lambda row: row.is_greedy).astype(np.bool_),
            texts=texts,
        )

    def _fill_slots(self, cache: Cache, rows: LeftRows[Array], has_greedy: bool) -> Slots:
        return Slots(
            cache=cache,
            flight=self.programs.cached.init_flight(self.programs.num_slots),
            is_full=jnp.array(False),
            lengths=rows.lengths,
            last_tokens=rows.last_tokens,
            num_generated=rows.num_generated,
            is_running=rows.is_running,
            keys=self.programs.sampler.make_keys(rows.row_ids, rows.sample_ids),
            is_greedy=rows.is_greedy if has_greedy else None,
            texts=rows.texts,
        )
