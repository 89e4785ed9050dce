"""Evaluations run in the micro-batches that training has, in every experiment: they fit where it fits."""

from pathlib import Path

import pytest

from realjax.apps.quickstart import EXPERIMENTS
from realjax.dataflow.graph import MFC
from realjax.dataflow.run import Evaluation, RolloutEvaluation, RunSpec
from realjax.options.fields import instances_of
from realjax.options.parallel import MFCConfig
from tests.experiments.any_experiment import Given, make_spec, options_of, write_given

EVALUATED = [name for name, experiment in EXPERIMENTS.items() if experiment.config_cls.EVALUATES]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return write_given(tmp_path_factory.mktemp("given"))


@pytest.mark.parametrize("option", ["n_mbs=2", "max_tokens_per_mb=64"])
@pytest.mark.parametrize("experiment", EVALUATED)
def test_an_evaluation_is_split_as_training_is(experiment: str, option: str, given: Given, tmp_path: Path):
    name, _, value = option.partition("=")
    config = EXPERIMENTS[experiment].config_cls()
    calls = {f"{call}__{name}": value for call in instances_of(config, MFCConfig)}
    options = options_of(experiment, given, tmp_path, **calls, eval_freq_steps=1)
    options["dataset.valid_path"] = options.get("dataset.train_path") or options["dataset.path"]
    spec = make_spec(experiment, options)
    assert isinstance(spec, RunSpec)
    wanted = {"num_mbs": None, "max_tokens_per_mb": None} | {"num_mbs" if name == "n_mbs" else name: int(value)}
    split = lambda call: {"num_mbs": call.num_mbs, "max_tokens_per_mb": call.max_tokens_per_mb}
    evaluation = spec.evaluation
    if isinstance(evaluation, Evaluation):
        # One row there is one row here, and rows divide alike.
        assert evaluation.loader.shapes.row_len == spec.loader.shapes.row_len
        assert evaluation.loader.shape[0] % (evaluation.num_mbs or 1) == 0
        assert split(evaluation) == wanted
    else:
        assert isinstance(evaluation, RolloutEvaluation)
    variants = evaluation.variants.values() if isinstance(evaluation, RolloutEvaluation) else [evaluation.calls]
    inferences = [c for calls in variants for c in calls if isinstance(c, MFC) and c.call == "inference"]
    assert all(split(call) == wanted for call in inferences)
    assert inferences or experiment in ("sft", "rw")
