"""Which kernel serves what, and what is said of it."""

import logging
import re
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import get_args

import jax
import numpy as np
import pytest

from realjax.engine.attention import choose as choose_module
from realjax.engine.attention.cases import Case, Use, find_capability
from realjax.engine.attention.choose import KERNELS, Choice, Kernel, choose, make_attention, make_decoding
from realjax.engine.attention.reference import dense_attention
from tests.given.models import CASE, make_layout, make_model

H100 = Case(use="rows", platform="gpu", dtype="bfloat16", head_dim=128, capability=(9, 0))
USES = get_args(Use)


def test_auto_has_a_kernel_for_every_case():
    for use, platform, dtype, head_dim, softcap, sinks in product(
        USES, ("cpu", "gpu", "tpu", "metal"), ("float32", "bfloat16"), (2, 64, 128, 576), (None, 50.0), (False, True)
    ):
        case = Case(use=use, platform=platform, dtype=dtype, head_dim=head_dim, softcap=softcap, sinks=sinks)
        kernel = KERNELS[choose("auto", case).kernel]
        assert kernel.find_fault(case) is None
        assert use != "decoding" or kernel.decoding


@pytest.mark.parametrize(
    ("use", "case", "kernel"),
    [
        ("rows", CASE, "skipping"),
        ("prefill", CASE, "blocked"),
        ("decoding", CASE, "dense"),
        ("rows", H100, "cudnn"),
        ("prefill", H100, "cudnn"),
        ("decoding", H100, "dense"),
        ("rows", replace(H100, capability=(8, 0)), "blocked"),  # an A100
        ("rows", replace(H100, capability=None), "blocked"),
        ("rows", replace(H100, dtype="float32"), "blocked"),
        ("rows", replace(H100, softcap=50.0), "blocked"),
        ("prefill", replace(H100, sinks=True), "cudnn"),
    ],
)
def test_auto_takes(use, case, kernel):
    assert choose("auto", replace(case, use=use)).kernel == kernel


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_that_is_asked_for_serves_every_use_that_it_has_a_form_for(name):
    for use in USES:
        chosen = choose(name, replace(H100, use=use))
        if use == "decoding" and KERNELS[name].decoding is None:
            assert chosen.kernel == "dense" and f"'{name}' has no form" in chosen.reason
        else:
            assert chosen.kernel == name


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"platform": "cpu"}, "needs a GPU, and the devices are of platform cpu; use auto"),
        ({"dtype": "float32"}, "needs a 16-bit type, and the model computes in float32; use auto"),
        ({"capability": (8, 0)}, "capability 9.0 .Hopper. or later, and the devices' is 8.0; use auto"),
        ({"capability": None}, "capability 9.0 .Hopper. or later, and the devices' is not known; use auto"),
        ({"softcap": 50.0}, "does not cap scores, and the model's are capped at 50; use auto"),
        ({"head_dim": 60}, "a multiple of 8 up to 256, and the model's is 60; use auto"),
        ({"head_dim": 264}, "a multiple of 8 up to 256, and the model's is 264; use auto"),
    ],
)
def test_a_kernel_that_cannot_serve_is_refused_in_words(use, changes, words):
    with pytest.raises(ValueError, match=f"attention: found 'cudnn'.*{words}"):
        choose("cudnn", replace(H100, use=use, **changes))


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=f"found 'flash3'; use one of auto, {', '.join(KERNELS)}"):
        choose("flash3", CASE)


def test_the_choice_is_said_with_its_reason(caplog):
    with caplog.at_level(logging.INFO, logger="realjax.engine"):
        make_attention("auto", CASE)
        make_decoding("blocked", replace(CASE, use="decoding"))
    assert [record.getMessage() for record in caplog.records] == [
        "attention of rows: skipping (no work before a block's first segment), on cpu in float32",
        "attention of decoding: dense ('blocked' has no form for one query a row), on cpu in float32",
    ]


def test_a_case_says_what_a_model_needs():
    scores = {"window": 16, "softcap": 30.0, "scale": 0.1, "sinks": True}
    case = Case.of("rows", make_model(**scores).config, make_layout(), np.dtype("float32"))
    assert case == replace(CASE, num_q_heads=8, num_kv_heads=2, **scores)


def test_a_capability_is_that_of_cuda():
    of = lambda text: find_capability(SimpleNamespace(compute_capability=text))
    assert (of("9.0"), of("10.3"), of("gfx90a"), find_capability(jax.devices()[0])) == ((9, 0), (10, 3), None, None)


def attend_as_if_one_sequence(q, k, v, segment_ids, scoring, sinks, max_segment_len):
    return dense_attention(q, k, v, segment_ids * 0, scoring, sinks)


@pytest.fixture
def wrong(monkeypatch):
    """A kernel that attends across packed sequences, in the place of the one that `auto` takes on CPUs."""
    kernel = Kernel(rows=attend_as_if_one_sequence, is_compared=True)
    monkeypatch.setitem(choose_module.KERNELS, "wrong", kernel)
    line = Choice(kernel="wrong", uses=("rows", "prefill"), reason="none")
    monkeypatch.setattr(choose_module, "CHOICES", (line, *choose_module.CHOICES))


@pytest.mark.parametrize("use", ["rows", "prefill"])
def test_auto_does_not_take_a_kernel_that_disagrees_with_the_definition(wrong, use, caplog):
    with caplog.at_level(logging.INFO, logger="realjax.engine"):
        make_attention("auto", replace(CASE, use=use))
    warning, choice = [record.getMessage() for record in caplog.records]
    assert re.match(
        f"attention of {use}: not wrong: its values differ from the definition by .* on packed rows", warning
    )
    assert choice.startswith(f"attention of {use}: {choose('auto', replace(CASE, use=use), ['wrong']).kernel}")


def test_a_kernel_that_is_asked_for_and_disagrees_is_refused(wrong):
    with pytest.raises(ValueError, match="attention: found 'wrong'; its values differ .* use auto"):
        make_attention("wrong", CASE)


def test_what_another_process_cannot_use_is_not_taken(wrong, monkeypatch, caplog):
    monkeypatch.setitem(choose_module.KERNELS, "wrong", Kernel(rows=dense_attention, is_compared=True))
    make_attention("wrong", CASE)
    monkeypatch.setattr(choose_module, "largest", lambda value: 1)
    make_attention("auto", CASE)
    assert "disagrees with the definition in another process" in caplog.text
