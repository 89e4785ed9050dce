"""Generation is the model's own: greedy tokens are transformers', samples do not depend on slots or layout."""

import numpy as np
import pytest
import torch

from realjax.core.axes import generate_rules
from realjax.core.generation_config import GenerationConfig
from realjax.engine.generate import Generator, Request
from realjax.models.build import Model
from tests.builders import make_layout, make_model, place_params, random_tree
from tests.parity.theirs import make_ours, make_theirs

EOS = 5
PROMPT_LENGTHS = [3, 17, 8, 1, 30, 12, 5, 9, 21]


def requests(vocab_size: int) -> list[Request]:
    rng = np.random.default_rng(0)
    return [
        Request(tokens=rng.integers(6, vocab_size, n).astype(np.int32), row_id=i) for i, n in enumerate(PROMPT_LENGTHS)
    ]


def generate(model: Model, params, config: GenerationConfig, *, num_slots: int, layout=None, eos=(EOS,)):
    layout = layout or make_layout()
    placed = place_params(model, params, layout, generate_rules(layout.strategy))
    generator = Generator(model, layout, config, eos_ids=eos, num_slots=num_slots, seed=3)
    return generator(placed, requests(model.config.vocab_size))


@pytest.mark.parametrize(("layout", "num_slots"), [({}, 4), ({"dp": 2, "tp": 2}, 8), ({"pp": 2}, 4), ({"dp": 2, "tp": 2, "pp": 2}, 8)], ids=str)
def test_greedy_tokens_are_those_of_transformers(layout, num_slots):
    theirs = make_theirs("llama")
    model, params = make_ours(theirs)
    config = GenerationConfig(max_new_tokens=20, min_new_tokens=0, greedy=True)
    ours = generate(model, params, config, num_slots=num_slots, layout=make_layout(**layout))
    for request, generation in zip(requests(model.config.vocab_size), ours):
        prompt = torch.from_numpy(request.tokens).long()[None]
        options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": EOS, "pad_token_id": 0}
        expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, prompt.shape[1] :]
        np.testing.assert_array_equal(generation.tokens, expected.numpy())
        assert generation.ended == (EOS in expected)


def test_samples_do_not_depend_on_slots_neighbours_or_layout():
    model = make_model()
    params = random_tree(model, scale=0.5)
    config = GenerationConfig(max_new_tokens=24, min_new_tokens=2, top_k=20, top_p=0.9, temperature=0.8)
    few, many, split = (
        generate(model, params, config, num_slots=slots, layout=make_layout(**layout), eos=range(6, 14))
        for slots, layout in ((2, {}), (8, {}), (4, {"dp": 2, "tp": 2}))
    )
    lengths = {len(generation.tokens) for generation in few}
    assert len(lengths) > 2 and min(lengths) >= 3  # rows end at different times, none at once
    for a, b, c in zip(few, many, split):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.tokens, c.tokens)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
        assert a.kept is not None and a.kept.shape[0] == len(a.tokens)


def test_prompts_beyond_the_models_positions_are_refused():
    model = make_model(max_positions=32)
    with pytest.raises(ValueError, match="prompt 4 has 30 tokens; with max_new_tokens=8 and the model's 32 positions"):
        generate(model, random_tree(model), GenerationConfig(max_new_tokens=8, min_new_tokens=0), num_slots=4)
