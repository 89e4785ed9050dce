"""Rows of a model that no token has change nothing: models of one tokenizer may have more of them than others."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from realjax.dataflow.run import RunSpec
from tests.given.checkpoints import pad_rows
from tests.given.compare import as_numbers
from tests.given.runs import (
    build_rl_spec,
    build_spec,
    load_executor,
    make_options,
)
from tests.given.texts import VOCAB, write_jsonl

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick")]
FILTERS: dict[str, dict[str, Any]] = {
    "filtered": {"algo__gen__top_k": 40, "algo__gen__top_p": 0.9},
    "bits": {"algo__gen__top_k": 300, "algo__gen__top_p": 0.95},
    "all tokens": {"algo__gen__top_k": 100_000, "algo__gen__top_p": 1.0},
}


def first_step(spec: RunSpec) -> dict[str, list[dict[str, float]]]:
    result = load_executor(spec).step(spec.loader.batch(0), 0)
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
def test_a_step_of_reinforcement_learning(case, given, tmp_path):
    """Answers, kept sets, KL and updates: over the tokens that all models of the run have."""

    def run(**changes: Path) -> dict[str, list[dict[str, float]]]:
        models = {"actor__path": given.actor, "ref__path": given.ref, "rew__path": given.actor} | changes
        return first_step(build_rl_spec(given, tmp_path, "grpo", **FILTERS[case], **models))

    expected = run()
    assert abs(expected["actor_train"][0]["kl_loss"]) > 1e-3
    for role in ("actor", "ref"):
        assert_same(run(**{f"{role}__path": padded(getattr(given, role), tmp_path / role)}), expected)


def test_a_step_of_dpo(tmp_path, given):
    rows = [{"prompt": "the film was", "pos_answers": [" good" * n], "neg_answers": [" bad" * n]} for n in range(1, 5)]
    pairs = write_jsonl(tmp_path / "pairs.jsonl", rows)

    def run(**changes: Path) -> dict[str, list[dict[str, float]]]:
        models = {"actor__path": given.language_model, "ref__path": given.ref} | changes
        spec = build_spec("dpo", make_options("dpo", given, tmp_path / "root", dataset__train_path=pairs, **models))
        assert isinstance(spec, RunSpec)
        return first_step(spec)

    expected = run()
    assert abs(expected["actor_train"][0]["kl"]) > 1e-2
    assert_same(run(ref__path=padded(given.ref, tmp_path / "ref")), expected)
    assert_same(run(actor__path=padded(given.language_model, tmp_path / "actor")), expected)


def test_a_reference_that_follows_the_actor_has_its_sizes(given, tmp_path):
    ref = padded(given.ref, tmp_path / "ref")
    message = r"^ref.path: it is to follow actor \(ref_ema_eta\), but differs from it in vocab_size; give a model"
    with pytest.raises(ValueError, match=message):
        build_rl_spec(given, tmp_path, ref__path=ref, algo__ref_ema_eta=0.5)
