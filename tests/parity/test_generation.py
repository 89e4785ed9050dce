"""The engine's greedy tokens are those that transformers generates, for every family."""

import numpy as np
import pytest
import torch

from realjax.core.generation_config import GenerationConfig
from realjax.engine.batching import Request
from tests.engine.generation_cases import run
from tests.given.models import FIRST_KINDS, SIZES
from tests.parity.theirs import make_ours, make_theirs

pytestmark = pytest.mark.usefixtures("quick")

NUM_NEW, NO_END = 32, SIZES["vocab_size"] - 1  # long enough to leave a window of 8 and 32 original positions behind
PROMPTS = [np.random.default_rng(n).integers(1, NO_END, n).astype(np.int32) for n in (5, 19, 9)]


@pytest.mark.parametrize("kind", [*FIRST_KINDS, "phi3-long"])
def test_greedy_tokens_are_those_of_transformers(kind):
    theirs = make_theirs(kind)
    config = GenerationConfig(max_new_tokens=NUM_NEW, min_new_tokens=NUM_NEW, greedy=True)
    requests = [Request(tokens=prompt, row_id=i) for i, prompt in enumerate(PROMPTS)]
    found = run(*make_ours(theirs), config, requests=requests, eos=(NO_END,))
    for prompt, generation in zip(PROMPTS, found, strict=True):
        ids = torch.from_numpy(prompt).long()[None]
        options = {"min_new_tokens": NUM_NEW, "max_new_tokens": NUM_NEW, "eos_token_id": NO_END, "pad_token_id": 0}
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
        np.testing.assert_array_equal(generation.tokens, expected[0, len(prompt) :].numpy())
