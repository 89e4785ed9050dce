"""What decoding carries in B slots, each with a row that is being continued, or free; what it is given, and gives."""

from dataclasses import dataclass
from typing import Generic

import jax
from jax import Array

from realjax.engine.cached_model import Cache, Flight
from realjax.engine.sampling import A, Drawn

# Tokens a row draws in a chunk at most. With fewer, the host sees sooner which rows have ended. With more, fewer chunks
# have to be started.
CHUNK_LEN = 32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """What decoding carries from token to token, for B slots."""

    cache: Cache
    flight: Flight  # what is between the pipeline's stages
    is_full: Array  # whether every stage has its wave there; not after prompts were put in or the cache has grown
    lengths: Array  # [B] tokens in the cache
    last_tokens: Array  # [B] drawn last, not yet in the cache
    num_generated: Array  # [B]
    is_running: Array  # [B]
    keys: Array  # [B] random keys
    is_greedy: Array | None  # [B]; None: no row differs from the options
    texts: Array | None = None  # [B, room] the tokens in the cache, where proposals are looked up; None: nowhere


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Prompts(Generic[A]):
    """P prompts to be put into slots, and the R rows that go on from them, perhaps several from one.

    The devices along `data` have equal parts of both in turn, as they have of the slots: a row's prompt and its slot
    are in its own part, and are counted there.
    """

    tokens: A  # [P, T] the prompt, and what has been generated after it
    lengths: A  # [P] 0 of an unused one
    sources: A  # [R] the row's prompt
    places: A  # [R] its slot; of unused rows, the number of slots
    num_generated: A  # [R] how many of the tokens are generated ones
    row_ids: A  # [R]
    sample_ids: A  # [R]
    is_greedy: A  # [R]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chunk(Generic[A]):
    """What a program drew, whole on every device: R rows' first tokens (K is 1), or up to K tokens of each slot."""

    drawn: Drawn[A]  # [R or B, K]
    counts: A  # [R or B] how many of K are drawn
    is_running: A  # [R or B]
    num_rounds: A  # how often all slots were decoded
    # Experts of the prompts' tokens [R, T, W], or of the tokens that the drawn ones follow [B, K, W], where recorded.
    routes: A | None = None
    # [B] in how many of the rounds a row was running, where it may draw several tokens in one.
    own_rounds: A | None = None
