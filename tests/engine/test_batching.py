"""Generation is the model's own: greedy tokens are transformers', samples do not depend on slots or layout."""

import logging
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch

from realjax.core.axes import generate_rules, inference_rules
from realjax.core.compute import Compute
from realjax.core.draw import Draw
from realjax.core.generation_config import GenerationConfig
from realjax.engine.batching import generate
from realjax.engine.compiled import CompileLog, place_batch
from realjax.engine.inference import make_inference
from tests.engine.generation_cases import EOS, PROMPT_LENGTHS, make_programs, make_requests, run
from tests.given.models import (
    FULL,
    fill_up,
    make_layout,
    make_model,
    place_params,
    quick_jit,
    random_tree,
    with_empty_layers,
)
from tests.given.sequences import pack_in_order
from tests.parity.theirs import make_ours, make_theirs

PIPELINED = [{"pp": 4}, {"dp": 2, "tp": 2, "pp": 2}, {"dp": 4, "pp": 2}]


@pytest.mark.parametrize(
    ("layout", "num_layers"),
    [({}, 2), ({"dp": 8}, 2), ({"tp": 4}, 2), *((layout, layout["pp"]) for layout in PIPELINED), ({"pp": 4}, 5)],
    ids=str,
)
def test_greedy_tokens_are_those_of_transformers(layout, num_layers):
    theirs = make_theirs("llama", num_hidden_layers=num_layers)
    num_empty = -num_layers % layout.get("pp", 1)  # of five layers in four stages, the last has none
    model, params = make_ours(theirs)
    model, params = with_empty_layers(model, num_empty), fill_up(params, num_empty)
    config = GenerationConfig(max_new_tokens=20, min_new_tokens=0, greedy=True)
    ours = run(model, params, config, make_layout(**layout))
    for request, generation in zip(make_requests(model.config.vocab_size), ours):
        prompt = torch.from_numpy(request.tokens).long()[None]
        options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": EOS, "pad_token_id": 0}
        expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, prompt.shape[1] :]
        np.testing.assert_array_equal(generation.tokens, expected.numpy())
        assert generation.ended == (EOS in expected)


def test_tokens_do_not_depend_on_slots_neighbours_or_layout():
    model = make_model()
    params = random_tree(model, scale=0.4)
    config = GenerationConfig(max_new_tokens=24, min_new_tokens=2, top_k=20, top_p=0.9, temperature=0.8)
    requests = [replace(request, is_greedy=i % 3 == 1) for i, request in enumerate(make_requests(96))]
    with_slots = lambda slots, **layout: run(
        model, params, config, make_layout(**layout), num_slots=slots, eos=range(6, 14), requests=requests
    )
    expected = with_slots(2)
    lengths = {len(generation.tokens) for generation in expected}
    assert len(lengths) > 2 and min(lengths) >= 3  # rows end at different times, none at once
    for found in (with_slots(8, dp=2, tp=2), with_slots(4, pp=2)):
        for a, b in zip(expected, found, strict=True):
            np.testing.assert_array_equal(a.tokens, b.tokens)
            np.testing.assert_array_equal(a.kept, b.kept)
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


@pytest.mark.parametrize("layout", [{"pp": 2}, {}], ids=str)
def test_empty_layers_change_no_token(layout):
    model = make_model(num_layers=3, **FULL)
    params, config = random_tree(model, scale=0.4), GenerationConfig(max_new_tokens=16, min_new_tokens=0, greedy=True)
    expected = run(model, params, config)
    for a, b in zip(expected, run(with_empty_layers(model, 1), fill_up(params, 1), config, make_layout(**layout))):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


def test_greedy_rows_beside_sampled_ones_are_those_of_a_greedy_run():
    model = make_model()
    params = random_tree(model, scale=0.4)
    sampled = GenerationConfig(max_new_tokens=12, min_new_tokens=3, top_k=20, temperature=0.7)
    greedy = GenerationConfig(max_new_tokens=12, min_new_tokens=3, greedy=True)
    requests = [replace(request, is_greedy=i % 2 == 0) for i, request in enumerate(make_requests(96))]
    mixed, without, alone = (
        run(model, params, config, requests=of, eos=range(40, 60))
        for config, of in ((sampled, requests), (sampled, make_requests(96)), (greedy, make_requests(96)))
    )
    for i, generation in enumerate(mixed):
        expected = alone[i] if i % 2 == 0 else without[i]
        np.testing.assert_array_equal(generation.tokens, expected.tokens)
        np.testing.assert_allclose(generation.logprobs, expected.logprobs, atol=1e-5)
        # A greedy row's distribution has no filter; every sampled token has a set.
        assert (generation.kept != 0).any(axis=1).all() == (i % 2 == 1) and generation.kept.any() == (i % 2 == 1)


@pytest.mark.parametrize(
    ("options", "layout"),
    [
        ({"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_new_tokens": 6}, {}),
        ({"temperature": 1.3, "top_k": 2, "top_p": 1.0, "min_new_tokens": 0}, {"tp": 2, "pp": 2}),
        ({"temperature": 1.4, "top_k": 10**6, "top_p": 0.6, "min_new_tokens": 4}, {"tp": 2}),
        ({"temperature": 0.8, "top_k": 10**6, "top_p": 1.0, "min_new_tokens": 8}, {"pp": 2}),
        ({"greedy": True, "min_new_tokens": 0}, {}),
        ({"greedy": True, "min_new_tokens": 8}, {}),
    ],
    ids=str,
)
def test_a_packed_forward_pass_gives_the_log_probabilities_of_the_draw(options, layout):
    model, layout = make_model(), make_layout(**layout)
    config, eos = GenerationConfig(max_new_tokens=16, **options), (7, 40)
    params, requests = random_tree(model, scale=0.4), make_requests(96)
    generations = run(model, params, config, layout, eos=eos, num_slots=4)
    draw, examples = Draw.of(config, 96, len(eos)), []
    for request, generation in zip(requests, generations):
        width = ((len(request.tokens), 0), (0, 0))
        pad = lambda x, width=width: np.pad(x, width[: x.ndim])
        example = {"tokens": np.concatenate([request.tokens, generation.tokens]), "logprobs": pad(generation.logprobs)}
        examples.append(example | ({} if draw.kept is None else {"kept": pad(generation.kept)}))
    batch = pack_in_order(examples, 64, num_rows=8)[0]
    rules = inference_rules(layout.strategy)
    infer = quick_jit(make_inference(model, "logprobs", layout, Compute(), draw=draw))
    logprobs = infer(place_params(model, params, layout, rules), place_batch(batch, rules, layout))["logprobs"]
    is_response = batch["logprobs"] != 0
    assert is_response.sum() > 50
    np.testing.assert_allclose(np.asarray(logprobs)[is_response], batch["logprobs"][is_response], atol=5e-5)


@pytest.mark.parametrize("layout", [{"dp": 2}, {"pp": 2}], ids=str)
def test_a_later_call_with_other_lengths_compiles_nothing(layout, caplog):
    model, layout, log = make_model(), make_layout(**layout), CompileLog()
    params = place_params(model, random_tree(model, scale=0.4), layout, generate_rules(layout.strategy))
    config = GenerationConfig(max_new_tokens=10, min_new_tokens=0, top_k=5)
    programs = make_programs(model, config, layout, log=log)
    reports: list[int] = []
    generate(programs, params, make_requests(96), progress_fn=reports.append)
    assert reports[-1] == len(PROMPT_LENGTHS) and reports == sorted(reports)
    num_programs = len(log.entries)
    with caplog.at_level(logging.DEBUG), jax.log_compiles():
        generate(programs, params, make_requests(96, [4, 31, 2, 2, 6]))
    assert num_programs == len(log.entries)
    assert not [record.getMessage() for record in caplog.records if "ompiling" in record.getMessage()]


def test_what_cannot_be_generated_is_refused():
    model = make_model(max_positions=32)
    config = GenerationConfig(max_new_tokens=8, min_new_tokens=0)
    with pytest.raises(ValueError, match="prompt 4 has 30 tokens; with max_new_tokens=8 and the model's 32 positions"):
        run(model, random_tree(model), config)
    with pytest.raises(ValueError, match="6 slots do not divide over dp=2 and pp=2; use a multiple of 4"):
        make_programs(model, config, make_layout(dp=2, pp=2), num_slots=6)
    with pytest.raises(ValueError, match=r"layers/.*size 3 does not divide over mesh axis 'pipe' of size 2.*\[1, 3\]"):
        make_programs(make_model(num_layers=3), config, make_layout(pp=2))
    with pytest.raises(ValueError, match="scalar head"):
        make_programs(make_model(is_critic=True), config, make_layout())
