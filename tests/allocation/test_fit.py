"""Micro-batches by memory: the fewest that fit, and none where something is said of them."""

import jax
import pytest

from realjax.allocation.fit import apply_counts, count_micro_batches, fit_micro_batches
from realjax.dataflow.graph import MicroBatches
from realjax.runtime.programs import num_micro_batches
from tests.given.runs import build_spec, make_options, make_plan, make_rl_options

SIZES = {"dataset.train_bs_n_seqs": 256, "dataset.max_seqlen": 32}


def make_sft(given, root, **changes):
    return build_spec(
        "sft", make_options("sft", given, root, **{"dataset.train_path": given.train, **SIZES, **changes})
    )


def predict(spec, counts, memory):
    """Returns the predicted step of the run with micro-batches as they are."""
    _, step = count_micro_batches(apply_counts(spec, counts), jax.devices()[:1], set(), memory)
    return step


def test_the_fewest_that_fit_are_taken_and_the_plan_has_them(given, tmp_path, caplog):
    spec = make_sft(given, tmp_path)
    whole = predict(spec, {}, None).calls[0].peak_bytes
    numbers = []
    for share in (4, 1.1, 0.8, 0.6):
        memory = int(whole * share)
        caplog.clear()
        with caplog.at_level("INFO", "realjax.allocation"):
            fitted = fit_micro_batches(spec, jax.devices()[:1], memory)
        (train,) = fitted.graph.mfcs
        numbers.append(train.micro_batches.count or 1)
        if numbers[-1] == 1:
            assert fitted.graph.mfcs == spec.graph.mfcs
            continue
        assert predict(fitted, {}, memory).fits and "allocation.n_mbs sets another number" in caplog.text
        assert not predict(spec, {train.name: numbers[-1] // 2} if numbers[-1] > 2 else {}, memory).fits
        plan = make_plan(fitted)
        assert num_micro_batches(train, plan.loader.batch(0), plan.layouts[train.name]) == numbers[-1]
    assert numbers == sorted(numbers) and numbers[0] == 1 and numbers[-1] > 2


@pytest.mark.parametrize("given_count", [{"allocation.n_mbs": 2}, {"allocation.max_tokens_per_mb": 4096}])
def test_what_is_given_stays(given, tmp_path, given_count):
    spec = make_sft(given, tmp_path, **given_count)
    assert fit_micro_batches(spec, jax.devices()[:1], memory_bytes=1).graph.mfcs == spec.graph.mfcs


def test_where_nothing_fits_a_line_says_what_would_help(given, tmp_path, caplog):
    fit_micro_batches(make_sft(given, tmp_path), jax.devices()[:1], memory_bytes=1)
    assert "trainDefault is predicted to need" in caplog.text and "GiB a device more than there is" in caplog.text


def test_every_call_of_a_step_has_its_own_and_evaluations_follow(given, tmp_path):
    options = make_rl_options(given, tmp_path, "grpo", dataset__train_bs_n_seqs=16, dataset__valid_path=given.held_out)
    spec = build_spec("grpo", {**options, "ref_inf.n_mbs": 1})
    fitted = fit_micro_batches(spec, jax.devices()[:1], memory_bytes=1)
    counts = {call.name: call.micro_batches for call in fitted.graph.mfcs if hasattr(call, "micro_batches")}
    assert counts["ref_inf"] == MicroBatches(count=1)
    assert counts["rew_inf"].count > 1 and counts["actor_train"].count > 1
    (evaluation,) = fitted.evaluations.values()
    judged = {call.name: call.micro_batches for call in evaluation.calls if hasattr(call, "micro_batches")}
    assert judged and all(counts[name] == found for name, found in judged.items())
    make_plan(fitted)
