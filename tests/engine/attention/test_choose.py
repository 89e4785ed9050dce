"""Which kernel serves what, and what is said of it."""

import logging
from dataclasses import replace
from itertools import product
from typing import get_args

import pytest

from realjax.engine.attention.choose import KERNELS, Case, Use, choose, make_attention, make_decoding
from tests.given.models import CASE

H100 = Case(use="rows", platform="gpu", dtype="bfloat16", head_dim=128)
USES = get_args(Use)


def test_auto_has_a_kernel_for_every_case():
    for use, platform, dtype, head_dim in product(
        USES, ("cpu", "gpu", "tpu", "metal"), ("float32", "bfloat16"), (2, 64, 128, 576)
    ):
        case = Case(use=use, platform=platform, dtype=dtype, head_dim=head_dim)
        kernel = KERNELS[choose("auto", case).kernel]
        assert kernel.find_fault(case) is None
        assert use != "decoding" or kernel.decoding


@pytest.mark.parametrize(
    ("use", "case", "kernel"),
    [
        ("rows", CASE, "blocked"),
        ("prefill", CASE, "blocked"),
        ("decoding", CASE, "dense"),
        ("rows", H100, "blocked"),
        ("decoding", H100, "dense"),
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
        "attention of rows: blocked (a fraction of the work and of the memory of dense), on cpu in float32",
        "attention of decoding: dense ('blocked' has no form for one query a row), on cpu in float32",
    ]
