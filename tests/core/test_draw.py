"""Sets of tokens survive being stored, in every form."""

import jax.numpy as jnp
import numpy as np
import pytest

from realjax.core.draw import REMOVED, Draw, KeptTokens
from realjax.core.generation_config import GenerationConfig

V = 1000


def config(**changes) -> GenerationConfig:
    return GenerationConfig(**{"max_new_tokens": 8, "min_new_tokens": 0, "top_k": V, "top_p": 1.0, **changes})


def random_sets(num_kept: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns processed logits `[B, V]` that leave so many tokens in each row, and the masks."""
    rng = np.random.default_rng(0)
    mask = np.stack([rng.permutation(V) < n for n in num_kept])
    return np.where(mask, rng.standard_normal(mask.shape), REMOVED).astype(np.float32), mask


@pytest.mark.parametrize(
    ("changes", "num_eos", "form", "num_kept"),
    [
        ({"top_k": 20}, 1, "kept", [1, 19, 20]),
        ({"top_k": 20, "top_p": 0.5}, 1, "kept", [1, 20]),
        ({"top_k": 500}, 1, "bits", [1, 30, 500, V]),
        ({"top_p": 0.5, "min_new_tokens": 2}, 1, "bits", [1, 31, V - 1, V]),
        ({"min_new_tokens": 2}, 3, "removed", [V - 3, V]),
        ({"min_new_tokens": 2, "greedy": True, "top_k": 20}, 3, "removed", [V - 3, V]),
    ],
    ids=str,
)
def test_sets_are_stored_small_and_exactly(changes, num_eos, form, num_kept):
    stored = KeptTokens.of(config(**changes), V, num_eos)
    logits, mask = random_sets(num_kept)
    packed = stored.pack(jnp.asarray(logits), jnp.asarray(mask.argmax(axis=1)))
    assert stored.form == form and packed.shape == stored.init((len(mask),)).shape
    assert packed[0].nbytes <= min(4 * changes.get("top_k", V), 4 * -(-V // 32))
    np.testing.assert_array_equal(stored.unpack(packed), mask)
    # What leaves nothing out is stored as zeros.
    np.testing.assert_array_equal(np.asarray(packed).any(axis=1), np.array(num_kept) < V)
    assert stored.unpack(stored.init((2, 3))).all()


def test_a_drawn_token_is_in_its_set_where_ties_are_more_than_it_holds():
    stored = KeptTokens.of(config(top_k=4), V)
    logits = np.full((1, V), REMOVED, np.float32)
    logits[0, 10:20] = 1.0
    mask = stored.unpack(stored.pack(jnp.asarray(logits), jnp.array([19])))[0]
    assert mask[19] and mask.sum() == 4 and mask[10:20].sum() == 4


@pytest.mark.parametrize(
    ("changes", "num_eos"),
    [
        ({}, 1),
        ({"min_new_tokens": 2}, 0),
        ({"top_k": 5, "force_no_logits_mask": True}, 1),
        ({"top_k": 5, "greedy": True}, 1),
    ],
    ids=str,
)
def test_nothing_is_stored_where_nothing_is_left_out_or_wanted(changes, num_eos):
    draw = Draw.of(config(temperature=0.5, **changes), V, num_eos)
    assert draw == Draw(1.0 if changes.get("greedy") else 0.5)
    assert hash(draw) == hash(Draw(draw.temperature))
