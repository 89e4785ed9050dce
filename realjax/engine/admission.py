"""Which waiting rows go into which free slots, and the prompts that are run for them.

Slots are dealt to the devices along `data` in equal parts, one after the other. A row's prompt is run by the devices
that have its slot, so that keys and values never move.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from realjax.core.generation_config import GenerationConfig
from realjax.engine.slot_arrays import Prompts
from realjax.engine.slots import SlotPrograms

SHORTEST_PROMPTS, SHORTEST_CACHE = 32, 128


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row that waits for a slot: its tokens `[L]`, of which the last `num_generated` are generated ones."""

    tokens: np.ndarray
    num_generated: int
    row_id: int
    sample_id: int
    is_greedy: bool


@dataclass(frozen=True, kw_only=True)
class Admission:
    """Prompts to be put into slots; `indices` say at which of their rows each entry is, `slots` into which it goes."""

    prompts: Prompts[np.ndarray]
    indices: Sequence[int]
    slots: Sequence[int]
    num_prompts: int  # that are run


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The slots as the devices along `data` have them, and how many rows enter at once."""

    num_parts: int
    slots_per_part: int
    rows_per_part: int  # that one program puts into slots
    prompt_multiple: int  # of the prompts of a part

    @classmethod
    def of(cls, programs: SlotPrograms) -> "Parts":
        """Returns the parts of the programs' slots."""
        strategy = programs.layout.strategy
        return cls(
            num_parts=strategy.dp,
            slots_per_part=programs.num_slots // strategy.dp,
            rows_per_part=programs.num_admitted // strategy.dp,
            prompt_multiple=strategy.pp,
        )

    def count_rows(self, free: Sequence[int]) -> int:
        """Returns how many rows one program can put into the slots `free`."""
        return sum(min(len(slots), self.rows_per_part) for slots in self._by_part(free))

    def admit(self, entries: Sequence[Entry], free: Sequence[int]) -> Admission:
        """Returns the prompts of entries, of which there are no more than `count_rows` allows, with slots for them.

        Entries of the same tokens share a prompt where they come into one part.
        """
        places = self._by_part(free)
        room = [min(len(slots), self.rows_per_part) for slots in places]
        texts: list[list[bytes]] = [[] for _ in range(self.num_parts)]
        rows: list[_Placed] = []
        for entry in entries:
            text = entry.tokens.tobytes()
            beside = (part for part in range(self.num_parts) if room[part] and text in texts[part])
            part = next(beside, int(np.argmax(room)))
            room[part] -= 1
            if text not in texts[part]:
                texts[part].append(text)
            index = min(len(places[part]), self.rows_per_part) - room[part] - 1
            rows.append(_Placed(entry, part, index, places[part][index], texts[part].index(text)))
        return Admission(
            prompts=self._pack(rows, self._prompts_per_part(len(rows), list(map(len, texts)))),
            indices=[row.part * self.rows_per_part + row.index for row in rows],
            slots=[row.slot for row in rows],
            num_prompts=sum(map(len, texts)),
        )

    def _by_part(self, slots: Iterable[int]) -> list[list[int]]:
        parts: list[list[int]] = [[] for _ in range(self.num_parts)]
        for slot in slots:
            parts[slot // self.slots_per_part].append(slot)
        return parts

    def _prompts_per_part(self, num_rows: int, num_prompts: Sequence[int]) -> int:
        """Returns how many prompts each part runs: as many as rows, or fewer where rows share them, in few sizes."""
        if num_rows < 2 * sum(num_prompts):
            return self.rows_per_part
        return min(self.rows_per_part, bucket_length(max(num_prompts), self.prompt_multiple))

    def _pack(self, rows: Sequence["_Placed"], prompts_per_part: int) -> Prompts[np.ndarray]:
        num_rows, num_prompts = self.num_parts * self.rows_per_part, self.num_parts * prompts_per_part
        longest = bucket_length(max(len(row.entry.tokens) for row in rows), SHORTEST_PROMPTS)
        tokens, lengths = np.zeros((num_prompts, longest), np.int32), np.zeros(num_prompts, np.int32)
        for row in rows:
            prompt, length = row.part * prompts_per_part + row.source, len(row.entry.tokens)
            tokens[prompt, :length], lengths[prompt] = row.entry.tokens, length

        def fill(values: Iterable[int], rest: int = 0) -> np.ndarray:
            filled = np.full(num_rows, rest, np.int32)
            filled[[row.part * self.rows_per_part + row.index for row in rows]] = list(values)
            return filled

        return Prompts(
            tokens=tokens,
            lengths=lengths,
            sources=fill(row.source for row in rows),
            places=fill((row.slot % self.slots_per_part for row in rows), rest=self.slots_per_part),
            num_generated=fill(row.entry.num_generated for row in rows),
            row_ids=fill(row.entry.row_id for row in rows),
            sample_ids=fill(row.entry.sample_id for row in rows),
            is_greedy=fill(row.entry.is_greedy for row in rows).astype(np.bool_),
        )


class _Placed(NamedTuple):
    entry: Entry
    part: int
    index: int  # among the part's rows
    slot: int
    source: int  # among the part's prompts


def bucket_length(num_tokens: int, shortest: int) -> int:
    """Returns the bucket of a length: `shortest` times a power of two."""
    length = shortest
    while length < num_tokens:
        length *= 2
    return length


def most_needed(longest_prompt: int, config: GenerationConfig) -> int:
    """Returns tokens a slot that no row outgrows."""
    num_new = -(-config.max_new_tokens // SHORTEST_CACHE) * SHORTEST_CACHE
    return bucket_length(longest_prompt, SHORTEST_PROMPTS) + num_new
