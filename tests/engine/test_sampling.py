"""What is drawn is what the options say, whatever stands beside a row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.core.draw import REMOVED
from realjax.core.generation_config import GenerationConfig
from realjax.engine.sampling import draw_tokens, filter_logits, row_keys, scale_logits

V = 1000
CASES = [(50, 0.9, 0.7), (V, 0.8, 1.0), (5, 1.0, 1.3), (2 * V, 0.5, 1.0), (200, 0.99, 2.0), (V, 1.0, 1.0)]
CASES += [(V, 0.95, 20.0)]  # so flat that top-p leaves more than are looked at first


def config(top_k: int, top_p: float, temperature: float, **changes) -> GenerationConfig:
    options = {"max_new_tokens": 8, "min_new_tokens": 0, "top_k": top_k, "top_p": top_p, "temperature": temperature}
    return GenerationConfig(**{**options, **changes})


def random_logits(seed: int = 0) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=V).astype(np.float32) * 3
    logits[10] = logits[11]  # a tie
    return logits


def process_logits(logits: jax.Array, num_generated: jax.Array, eos: tuple[int, ...], config: GenerationConfig):
    """Returns the logits of the distribution that is drawn from."""
    return filter_logits(scale_logits(logits, num_generated, eos, config), config)[0]


def kept_by_sorting(logits: np.ndarray, top_k: int, top_p: float, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns which tokens stay and their probabilities, both filters taken independently, by plain sorting."""
    scaled = (logits / np.float32(temperature)).astype(np.float64)
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    keep = scaled >= np.sort(scaled)[-min(top_k, V)]
    ascending = np.argsort(scaled)
    keep[ascending[np.cumsum(probs[ascending]) <= 1 - top_p]] = False
    keep[scaled.argmax()] = True
    kept = np.where(keep, probs, 0)
    return keep, kept / kept.sum()


@pytest.mark.parametrize(("top_k", "top_p", "temperature"), CASES)
def test_20000_draws_follow_the_filtered_distribution(top_k, top_p, temperature):
    logits, num_draws = random_logits(), 20_000
    keep, probs = kept_by_sorting(logits, top_k, top_p, temperature)
    zeros = jnp.zeros(num_draws, jnp.int32)
    processed = process_logits(jnp.array(logits)[None], zeros[:1], (3,), config(top_k, top_p, temperature))
    np.testing.assert_array_equal(np.asarray(processed[0]) > REMOVED, keep)
    draw = jax.jit(lambda keys: draw_tokens(jnp.tile(processed, (num_draws, 1)), keys, zeros, is_greedy=None))
    tokens, logprobs = map(np.asarray, draw(row_keys(1, jnp.arange(num_draws), zeros)))
    np.testing.assert_allclose(logprobs, np.log(probs[tokens]), atol=1e-5)
    counts, expected = np.bincount(tokens, minlength=V), probs * num_draws
    is_common = expected > 5
    counts = np.append(counts[is_common], counts[~is_common].sum())
    expected = np.append(expected[is_common], expected[~is_common].sum())
    statistic = np.sum((counts - expected) ** 2 / np.maximum(expected, 1e-9), where=expected > 0)
    freedom = np.sum(expected > 0) - 1
    # Wilson and Hilferty's normal approximation of chi-square: four deviations are one in 30,000.
    deviations = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / np.sqrt(2 / (9 * freedom))
    assert deviations < 4


def test_end_of_text_cannot_be_drawn_early_and_greedy_takes_the_likeliest():
    logits = jnp.array(random_logits()).at[7].set(50.0)[None].repeat(2, axis=0)
    options = config(50, 0.9, 1.0, min_new_tokens=3, greedy=True)
    processed = process_logits(logits, jnp.array([2, 3]), (7,), options)
    tokens, logprobs = draw_tokens(processed, row_keys(0, jnp.arange(2), jnp.arange(2)), jnp.zeros(2), is_greedy=True)
    assert tokens[0] != 7 and tokens[1] == 7
    np.testing.assert_allclose(logprobs[1], jax.nn.log_softmax(logits[1])[7], atol=1e-6)


def test_a_draw_depends_on_its_own_row_alone():
    logits = jnp.array(np.stack([random_logits(seed) for seed in range(4)]))
    draw = lambda rows: draw_tokens(
        process_logits(logits[rows], jnp.zeros(len(rows)), (), config(100, 0.9, 1.0)),
        row_keys(5, rows, jnp.zeros(len(rows), jnp.int32)),
        jnp.zeros(len(rows), jnp.int32),
        is_greedy=None,
    )[0]
    together, alone = draw(jnp.arange(4)), jnp.concatenate([draw(jnp.array([row])) for row in range(4)])
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize(
    "changes",
    [{"top_p": 0.0}, {"top_p": 1.1}, {"top_k": 0}, {"temperature": -1.0}, {"min_new_tokens": 9}, {"max_new_tokens": 0}],
    ids=str,
)
def test_options_outside_their_range_are_refused(changes):
    with pytest.raises(ValueError, match=rf"^{next(iter(changes))}: found .*; it must be "):
        config(**{"top_k": 5, "top_p": 0.5, "temperature": 1.0, **changes})
    assert config(5, 0.5, 0.0).greedy
