"""Generation that can be polled: rows are put in at any time, continued side by side, and come out as they end.

A prompt that waits takes the slot of a row that has ended (continuous batching). Every process of a run takes the same
decisions in the same order: they follow from what was submitted and from the tokens alone.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np
from jax import Array

from realjax.core.metrics import Mean
from realjax.core.trees import Tree
from realjax.engine.admission import SHORTEST_CACHE, Entry, Parts, bucket_length, most_needed
from realjax.engine.sampling import Drawn
from realjax.engine.slot_arrays import CHUNK_LEN, Chunk, Slots
from realjax.engine.slots import SlotPrograms
from realjax.engine.tail import Tail


@dataclass(frozen=True, kw_only=True, eq=False)
class Generation:
    """The continuation of a prompt: tokens `[N]` with the end-of-text token, if it came, and their log-probabilities.

    `kept` `[N, W]` says which tokens each was drawn from, see `core.draw.KeptTokens`; None where sets are not recorded.
    `routes` `[L + N, W]` are the experts of the prompt's tokens and of these, see `core.routes.Routes`, None where they
    are not recorded; those of the last are not known. `ended`: it ends with an end-of-text token or a stop text.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    ended: bool
    kept: np.ndarray | None
    routes: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """A prompt `[L]` int32 to be continued. Its randomness follows from the seed, `row_id` and `sample_id` alone.

    `is_greedy` takes the likeliest tokens, whatever the options say of sampling. `begun` is what was generated before,
    perhaps by other parameters: the continuation begins with it, and goes on as if it had not been interrupted.
    """

    tokens: np.ndarray
    row_id: int
    sample_id: int = 0
    is_greedy: bool = False
    begun: Generation | None = None

    @property
    def num_begun(self) -> int:
        return 0 if self.begun is None else len(self.begun.tokens)

    def enter(self) -> Entry:
        """Returns what is put into a slot."""
        begun = [] if self.begun is None else [self.begun.tokens]
        return Entry(
            tokens=np.concatenate([self.tokens, *begun]),
            num_generated=self.num_begun,
            row_id=self.row_id,
            sample_id=self.sample_id,
            is_greedy=self.is_greedy,
        )


# fetch_fn(chunk) -> the chunk's arrays, whole on each device of the layout, as numpy ones in every process.
FetchFn = Callable[[Chunk[Array]], Chunk[np.ndarray]]
# stop_fn(prompt, tokens, num_seen) -> whether the tokens generated so far hold a stop text, where the first `num_seen`
# of them do not. Once True, it is True of more tokens.
StopFn = Callable[[np.ndarray, np.ndarray, int], bool]


class _Row:
    """A request in a slot, and what the host has seen of its continuation."""

    def __init__(self, number: int, request: Request, slot: int) -> None:
        self.number, self.request, self.slot = number, request, slot
        self.parts = [] if request.begun is None else [_to_drawn(request.begun)]  # views of what chunks hold
        self.num_generated = request.num_begun
        self.num_checked = 0  # of them, by the stop function
        self.num_entered = len(request.tokens) + request.num_begun  # tokens that were put into the slot
        begun = None if request.begun is None else request.begun.routes
        self.routes = [] if begun is None else [begun[:-1]]
        self.num_routed = 0 if begun is None else len(begun) - 1

    @property
    def num_cached(self) -> int:
        return len(self.request.tokens) + max(0, self.num_generated - 1)

    def add(self, drawn: Drawn[np.ndarray], count: int) -> None:
        self.parts.append(jax.tree.map(lambda x: x[:count], drawn))
        self.num_generated += count

    def add_routes(self, routes: np.ndarray, count: int) -> None:
        """Adds the experts `[K, W]` of the tokens that were put in, or of those before the next `count` drawn."""
        first = self.num_routed if self.num_routed < self.num_entered else 0
        part = routes[first : self.num_entered] if self.num_routed < self.num_entered else routes[:count]
        self.routes.append(part)
        self.num_routed += len(part)

    def find_stop(self, stop_fn: StopFn) -> int | None:
        """Returns how many tokens there are up to the end of the first stop text, None where there is none."""
        tokens, seen = np.concatenate([part.tokens for part in self.parts]), self.num_checked
        if not stop_fn(self.request.tokens, tokens, seen):
            self.num_checked = self.num_generated
            return None
        least, most = seen + 1, len(tokens)
        while least < most:
            middle = (least + most) // 2
            found = stop_fn(self.request.tokens, tokens[:middle], seen)
            least, most = (least, middle) if found else (middle + 1, most)
        return most

    def finish(self, num_tokens: int, ended: bool) -> Generation:
        # Once, at the end: sets of kept tokens are large.
        drawn = jax.tree.map(lambda *parts: np.concatenate(parts)[:num_tokens], *self.parts)
        routes = self._join_routes(num_tokens)
        return Generation(tokens=drawn.tokens, logprobs=drawn.logprobs, ended=ended, kept=drawn.kept, routes=routes)

    def interrupt(self) -> Request:
        """Returns a request that goes on where the row stands."""
        return replace(self.request, begun=self.finish(self.num_generated, ended=False))

    def _join_routes(self, num_tokens: int) -> np.ndarray | None:
        if not self.routes:
            return None
        # All but the last token have been followed by another, and so have gone through the model.
        routes = np.concatenate(self.routes)[: len(self.request.tokens) + num_tokens - 1]
        return np.pad(routes, ((0, 1), (0, 0)))


@dataclass(frozen=True)
class _Sent:
    """A program that was sent off, and the rows by their place in what it returns."""

    chunk: Chunk[Array]
    rows: Mapping[int, _Row]


class Batcher:
    """Continues rows under one set of parameters. Rows are known by the numbers that `submit` gives them."""

    def __init__(
        self,
        programs: SlotPrograms,
        params: Tree,
        *,
        stop_fn: StopFn | None = None,
        fetch_fn: FetchFn | None = None,
        chunk_len: int = CHUNK_LEN,
        tail: Tail | None = None,
    ) -> None:
        """`fetch_fn` None: all of the layout's devices are this process's. `chunk_len` tokens a row are decoded between
        two looks at them, at most CHUNK_LEN. `tail`: where rows go on once no other waits and they fit there.
        """
        self.programs, self.stop_fn, self.chunk_len = programs, stop_fn, chunk_len
        self.fetch_fn: FetchFn = fetch_fn or (lambda chunk: jax.tree.map(np.asarray, chunk))
        self.num_prompts = 0  # that were run; rows put into slots together share those that are the same
        self.num_rounds = 0  # of the chunks looked at; in each, every running row draws a token, or more
        self.per_round = Mean(0, 0)  # the tokens that a running row has drawn in a round, where they may be several
        self._params, self._tail = programs.prepare(params), tail
        self._slots: Slots | None = None
        self._num_submitted = 0
        self._waiting: deque[tuple[int, Request]] = deque()
        self._parts = Parts.of(programs)
        self._places: list[int] = []  # free slots that waiting rows are being put into
        self._active: dict[int, _Row] = {}  # by slot
        self._sent: deque[_Sent] = deque()  # not looked at
        self._results: dict[int, Generation] = {}

    def answer(self, requests: Iterable[Request], progress_fn: Callable[[int], None] | None = None) -> list[Generation]:
        """Returns the continuation of each request, in their order; `progress_fn` is told how many have ended."""
        numbers, found, is_left = self.submit(requests), {}, True
        while is_left:
            is_left = self.poll()
            found |= self.results()
            if progress_fn is not None:
                progress_fn(len(found))
        return [found[number] for number in numbers]

    def submit(self, requests: Iterable[Request]) -> list[int]:
        """Adds rows to those waiting; returns their numbers.

        Raises ValueError for a prompt too long for the model, or generated tokens that cannot be continued.
        """
        requests = list(requests)
        for request in requests:
            self._check(request)
        numbers = [self._num_submitted + i for i in range(len(requests))]
        self._num_submitted += len(requests)
        self._waiting.extend(zip(numbers, requests))
        return numbers

    def poll(self) -> bool:
        """Sends off one program at most, prompts put into slots or a chunk decoded, and looks at what the one before
        it has drawn. Returns whether rows are left.

        The host waits for the program before, never for the one it sent off: no longer than a chunk takes.
        """
        if self._tail is not None and self._active and not self._waiting and self._tail.fits(self._active):
            self._move_to(self._tail)
        was_sent = self._send()
        if len(self._sent) > was_sent:
            self._look()
        return bool(self._active or self._waiting)

    def results(self) -> dict[int, Generation]:
        """Returns what has ended since the last call, by the rows' numbers, in order of ending."""
        results, self._results = self._results, {}
        return results

    def drawn(self) -> dict[int, np.ndarray]:
        """Returns the tokens `[N]` that rows in slots have drawn, as far as they were looked at, by their numbers."""
        rows = [row for row in self._active.values() if row.parts]
        return {row.number: np.concatenate([part.tokens for part in row.parts]) for row in rows}

    def take_out(self, numbers: Iterable[int]) -> dict[int, Request]:
        """Takes rows out of their slots, or of those waiting, once the programs sent off are done.

        Returns, by number, requests that go on where the rows stand, here or under other parameters. Rows that ended
        before they could be taken out are left out: they are among the results.
        """
        while self._sent:
            self._look()
        wanted = set(numbers)
        rows = [row for row in self._active.values() if row.number in wanted]
        self._free(rows)
        taken = {number: request for number, request in self._waiting if number in wanted}
        self._waiting = deque(waiting for waiting in self._waiting if waiting[0] not in wanted)
        return taken | {row.number: row.interrupt() for row in rows}

    def _check(self, request: Request) -> None:
        config, model = self.programs.sampler.config, self.programs.model.config
        most, new = model.max_positions, config.max_new_tokens
        if not 0 < len(request.tokens) <= most - new:
            raise ValueError(
                f"generate: prompt {request.row_id} has {len(request.tokens)} tokens; with max_new_tokens={new} and "
                f"the model's {most} positions it needs 1 to {most - new}; shorten prompts or lower max_new_tokens"
            )
        if request.begun is None:
            return
        if request.begun.ended or request.num_begun >= new:
            raise ValueError(
                f"generate: what was generated for prompt {request.row_id} before, {request.num_begun} tokens, is "
                f"complete or not below max_new_tokens={new}; only a row that has not ended can go on"
            )
        kept, stored = request.begun.kept, self.programs.sampler.find_kept_form(model.vocab_size)
        if (None if kept is None else kept.shape[1]) != (None if stored is None else stored.width):
            raise ValueError(
                f"generate: what was generated for prompt {request.row_id} before records kept tokens in another form; "
                "go on with the same sampling options"
            )

    def _send(self) -> bool:
        """Sends off a program where there is something to do before the last one has been looked at."""
        if not (self._waiting and self._goes_on()):
            self._places = []
            if self._is_due():
                if self._sent:
                    return False  # rows that ended in what has been sent free their slots too
                self._make_room()
                self._places = self._free_slots()
        if self._waiting and self._places:
            self._admit()
        elif self._active:
            self._decode()
        else:
            return False
        return True

    def _goes_on(self) -> bool:
        """Returns whether more prompts follow those just put in: where they would leave many places empty, they wait
        until more slots are free.
        """
        return 2 * self._parts.count_rows(self._places) >= self.programs.num_admitted

    def _is_due(self) -> bool:
        """Returns whether decoding has to be interrupted: for waiting rows, or for a cache that is full."""
        num_free = self.programs.num_slots - len(self._active)
        if self._waiting and (num_free >= self.programs.num_admitted or not self._active):
            return True
        return self._slots is not None and self._most_cached() >= self.programs.cache_length(self._slots)

    def _most_cached(self) -> int:
        return max((row.num_cached for row in self._active.values()), default=0)

    def _free_slots(self) -> list[int]:
        return [slot for slot in range(self.programs.num_slots) if slot not in self._active]

    def _make_room(self) -> None:
        """Makes the slots, or changes them, so that they hold the rows in them and those waiting, greedy ones too."""
        requests = [request for _, request in self._waiting]
        longest = max([self._most_cached(), *(len(r.tokens) + r.num_begun for r in requests)])
        everyone = [*requests, *(row.request for row in self._active.values())]
        length = min(bucket_length(longest + 1, SHORTEST_CACHE), self._most_needed(everyone))
        has_greedy = any(request.is_greedy for request in requests)
        if self._slots is None:
            self._slots = self.programs.start(length, has_greedy)
            return
        if length > self.programs.cache_length(self._slots):
            self._slots = self.programs.grow(self._slots, length)
        if has_greedy:
            self._slots = self.programs.allow_greedy(self._slots)

    def _most_needed(self, requests: Iterable[Request]) -> int:
        """Returns a length that no row outgrows. For long answers it is far below the next power of two."""
        return most_needed(max(len(request.tokens) for request in requests), self.programs.sampler.config)

    def _admit(self) -> None:
        assert self._slots is not None, "places are given after there is room"
        num = min(self._parts.count_rows(self._places), len(self._waiting))
        taken = [self._waiting.popleft() for _ in range(num)]
        admission = self._parts.admit([request.enter() for _, request in taken], self._places)
        rows = [_Row(number, request, slot) for (number, request), slot in zip(taken, admission.slots)]
        self._places = [slot for slot in self._places if slot not in admission.slots]
        self._active |= {row.slot: row for row in rows}
        self._slots, chunk = self.programs.admit(self._params, self._slots, admission.prompts)
        self._sent.append(_Sent(chunk, dict(zip(admission.indices, rows))))
        self.num_prompts += admission.num_prompts

    def _decode(self) -> None:
        assert self._slots is not None, "rows are in slots"
        # Until enough slots are free for the next prompts, or all are.
        stop_at = self.programs.num_slots - self.programs.num_admitted if self._waiting else 0
        self._slots, chunk = self.programs.decode(self._params, self._slots, stop_at, self.chunk_len)
        self._sent.append(_Sent(chunk, dict(self._active)))

    def _move_to(self, tail: Tail) -> None:
        """Has the rows that are left go on in other slots, with what has been sent off looked at before."""
        while self._sent:
            self._look()
        if not self._active:
            return
        assert self._slots is not None, "rows are in slots"
        entries = {slot: row.interrupt().enter() for slot, row in self._active.items()}
        self._params, self._slots, moved = tail.move(self._params, self._slots, entries)
        self._active = {moved[slot]: row for slot, row in self._active.items()}
        for slot, row in self._active.items():
            row.slot = slot
        self.programs, self._parts, self._tail = tail.programs, Parts.of(tail.programs), None

    def _look(self) -> None:
        """Waits for the earliest program that has not been looked at, and takes over what its rows have drawn."""
        sent = self._sent.popleft()
        chunk = self.fetch_fn(sent.chunk)
        self.num_rounds += int(chunk.num_rounds)
        if chunk.own_rounds is not None:
            self.per_round = self.per_round.merged(Mean(int(chunk.counts.sum()), int(chunk.own_rounds.sum())))
        stopped = []
        for place, row in sent.rows.items():
            if self._active.get(row.slot) is not row:
                continue  # it met its stop text before
            if count := int(chunk.counts[place]):
                row.add(jax.tree.map(lambda x, place=place: x[place], chunk.drawn), count)
                if chunk.routes is not None:
                    row.add_routes(chunk.routes[place], count)
            num_tokens = None if self.stop_fn is None or not count else row.find_stop(self.stop_fn)
            if num_tokens is not None:
                self._results[row.number] = row.finish(num_tokens, ended=True)
                stopped.append(row)
            elif not chunk.is_running[place]:
                is_eos = int(row.parts[-1].tokens[-1]) in self.programs.sampler.eos_ids
                self._results[row.number] = row.finish(row.num_generated, ended=is_eos)
                del self._active[row.slot]
        self._free(stopped)

    def _free(self, rows: Sequence[_Row]) -> None:
        """Ends rows that may be running and frees their slots."""
        if not rows:
            return
        assert self._slots is not None, "rows are in slots"
        is_stopped = np.zeros(self.programs.num_slots, np.bool_)
        for row in rows:
            is_stopped[row.slot] = True
            del self._active[row.slot]
        self._slots = self.programs.stop(self._slots, is_stopped)


def generate(
    programs: SlotPrograms,
    params: Tree,
    requests: Sequence[Request],
    *,
    stop_fn: StopFn | None = None,
    fetch_fn: FetchFn | None = None,
    progress_fn: Callable[[int], None] | None = None,
    tail: Tail | None = None,
) -> list[Generation]:
    """As a batcher's `answer`."""
    return Batcher(programs, params, stop_fn=stop_fn, fetch_fn=fetch_fn, tail=tail).answer(requests, progress_fn)


def _to_drawn(generation: Generation) -> Drawn[np.ndarray]:
    return Drawn(generation.tokens, generation.logprobs, generation.kept)
