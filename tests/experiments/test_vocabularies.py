"""Rows of a model that no token has change nothing: models of one tokenizer may have more of them than others."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from realjax.dataflow.run import RunSpec
from tests.e2e.builders import VOCAB
from tests.experiments.any_experiment import make_spec, options_of, pad_rows, write_given
from tests.experiments.rl_runs import (
    RLInputs,
    as_numbers,
    make_executor,
    make_rl_spec,
    quick_compiles,
    write_rl_inputs,
)

pytestmark = pytest.mark.slow
FILTERS: dict[str, dict[str, Any]] = {
    "filtered": {"algo__gen__top_k": 40, "algo__gen__top_p": 0.9},
    "bits": {"algo__gen__top_k": 300, "algo__gen__top_p": 0.95},
    "all tokens": {"algo__gen__top_k": 100_000, "algo__gen__top_p": 1.0},
}


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_compiles():
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> RLInputs:
    return write_rl_inputs(tmp_path_factory.mktemp("rl"))


def first_step(spec: RunSpec) -> dict[str, list[dict[str, float]]]:
    result = make_executor(spec).step(spec.loader.batch(0), 0)
    return {call: as_numbers(updates) for call, updates in result.metrics.items()}


def assert_same(found: Mapping[str, list[dict[str, float]]], expected: Mapping[str, list[dict[str, float]]]) -> None:
    for call, updates in expected.items():
        for ours, theirs in zip(found[call], updates, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5), call


def padded(source: Path, out: Path) -> Path:
    pad_rows(source, out, VOCAB + 40)
    if (generation := source / "generation_config.json").exists():
        (out / generation.name).write_text(generation.read_text())
    return out


@pytest.mark.parametrize("case", FILTERS)
def test_a_step_of_reinforcement_learning(case, inputs, tmp_path):
    """Answers, kept sets, KL and updates: over the tokens that all models of the run have."""

    def run(**changes: Path) -> dict[str, list[dict[str, float]]]:
        models = {"actor__path": inputs.actor, "ref__path": inputs.ref, "rew__path": inputs.actor} | changes
        return first_step(make_rl_spec(inputs, tmp_path, "grpo", **FILTERS[case], **models))

    expected = run()
    assert abs(expected["actor_train"][0]["kl_loss"]) > 1e-3
    for role in ("actor", "ref"):
        assert_same(run(**{f"{role}__path": padded(getattr(inputs, role), tmp_path / role)}), expected)


def test_a_step_of_dpo(tmp_path, inputs):
    given = write_given(tmp_path / "given")
    rows = [
        {"id": i, "prompt": "the film was", "pos_answers": [" good" * (1 + i)], "neg_answers": [" bad" * (1 + i)]}
        for i in range(4)
    ]
    (given.folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(**changes: Path) -> dict[str, list[dict[str, float]]]:
        models = {"actor__path": given.language_model, "ref__path": inputs.ref} | changes
        spec = make_spec("dpo", options_of("dpo", given, tmp_path / "root", **models))
        assert isinstance(spec, RunSpec)
        return first_step(spec)

    expected = run()
    assert abs(expected["actor_train"][0]["kl"]) > 1e-2
    assert_same(run(ref__path=padded(inputs.ref, tmp_path / "ref")), expected)
    assert_same(run(actor__path=padded(given.language_model, tmp_path / "actor")), expected)


def test_a_reference_that_follows_the_actor_has_its_sizes(inputs, tmp_path):
    ref = padded(inputs.ref, tmp_path / "ref")
    message = r"^ref.path: it is to follow actor \(ref_ema_eta\), but differs from it in vocab_size; give a model"
    with pytest.raises(ValueError, match=message):
        make_rl_spec(inputs, tmp_path, ref__path=ref, algo__ref_ema_eta=0.5)
