"""Evaluations run in the micro-batches that training has, in every experiment: they fit where it fits."""

from pathlib import Path

import jax
import pytest

from realjax.allocation.allocate import allocate
from realjax.apps.quickstart import EXPERIMENTS
from realjax.dataflow.graph import Inference, MicroBatches
from realjax.dataflow.run import Evaluation, RolloutEvaluation, RunSpec
from realjax.options.fields import find_instances
from realjax.options.parallel import MFCConfig
from tests.given.runs import Given, build_spec, list_models, make_options

EVALUATED = [name for name, experiment in EXPERIMENTS.items() if experiment.config_cls.EVALUATES]


@pytest.mark.parametrize("option", ["n_mbs=2", "max_tokens_per_mb=64"])
@pytest.mark.parametrize("experiment", EVALUATED)
def test_an_evaluation_is_split_as_training_is(experiment: str, option: str, given: Given, tmp_path: Path):
    name, _, value = option.partition("=")
    config = EXPERIMENTS[experiment].config_cls()
    calls = {f"{call}__{name}": value for call in find_instances(config, MFCConfig)}
    options = make_options(experiment, given, tmp_path, **calls, eval_freq_steps=1)
    options["dataset.valid_path"] = options.get("dataset.train_path") or options["dataset.path"]
    spec = build_spec(experiment, options)
    assert isinstance(spec, RunSpec)
    wanted = MicroBatches(**{{"n_mbs": "count", "max_tokens_per_mb": "max_tokens"}[name]: int(value)})
    (evaluation,) = spec.evaluations.values()
    if isinstance(evaluation, Evaluation):
        # One row there is one row here, and rows divide alike.
        plan = allocate(spec, jax.devices()[:1])
        (held_out,) = plan.held_out.values()
        assert held_out.shapes.row_len == plan.loader.shapes.row_len
        assert held_out.shape[0] % (evaluation.micro_batches.count or 1) == 0
        assert evaluation.micro_batches == wanted
    else:
        assert isinstance(evaluation, RolloutEvaluation)
    inferences = [call for call in evaluation.calls if isinstance(call, Inference)]
    assert all(call.micro_batches == wanted for call in inferences)
    assert inferences or len(list_models(experiment)) == 1
