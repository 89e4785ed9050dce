"""Losses, gradients and metrics of actor and critic are the same in every packing, split and layout of a real model."""

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest

from realjax.algorithms.policy import make_policy_loss
from realjax.algorithms.ppo import CRITIC_INPUTS, PPOParameters, make_advantages, make_critic_loss
from realjax.core.axes import train_rules
from realjax.core.metrics import finalize
from realjax.engine.compiled import place_batch
from realjax.engine.train import TrainOptions, make_gradients
from tests.algorithms.rollout_cases import PACKINGS, Packing, make_rollouts, run_host_call
from tests.given.compare import assert_close_in_norm
from tests.given.models import make_layout, make_model, place_params, quick_jit, random_tree

PARAMETERS = PPOParameters(
    loss_aggregation="sequence", kl_in="loss", kl_estimator="k3", entropy_coef=0.01, eps_clip_high=0.3, kl_ctl=0.2
)
SPREADS = {
    "micro-batches": ({}, replace(PACKINGS["two rows"], num_rows=4), 2),
    "dp2 tp2 pp2": ({"dp": 2, "tp": 2, "pp": 2, "zero": 1}, replace(PACKINGS["short rows"], num_rows=16), 2),
}


def train(role: str, spread: tuple[dict, Packing, int]):
    """Returns the mean loss, the gradients and the metrics of one training step."""
    sizes, packing, num_mbs = spread
    model = make_model(is_critic=role == "critic")
    loss = make_critic_loss(PARAMETERS) if role == "critic" else make_policy_loss(PARAMETERS)
    keys = CRITIC_INPUTS if role == "critic" else PARAMETERS.actor_inputs
    rollouts = make_rollouts()
    outputs, _ = run_host_call(make_advantages(PARAMETERS), rollouts)
    rollouts = [r | {key: outputs[key][i] for key in outputs} for i, r in enumerate(rollouts)]
    batch, _ = packing.pack(rollouts)
    layout = make_layout(**sizes)
    gradients = quick_jit(make_gradients(model, loss, layout, TrainOptions(num_mbs=num_mbs)))
    placed = place_batch(batch.select((*keys, "segment_ids", "positions")), train_rules(layout.strategy), layout)
    grads, sums = gradients(place_params(model, random_tree(model), layout), placed)
    metrics = {name: float(value) for name, value in finalize(sums.metrics).items()}
    weight = float(sums.loss.weight)
    return float(sums.loss.sum) / weight, jax.tree.map(lambda g: np.asarray(g) / weight, grads), metrics


@cache
def train_on_one_device(role: str):
    return train(role, ({}, PACKINGS["short rows"], 1))


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("role", ["actor", "critic"])
def test_training_does_not_depend_on_the_spread(role, spread):
    loss, grads, metrics = train(role, SPREADS[spread])
    expected_loss, expected_grads, expected_metrics = train_on_one_device(role)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_close_in_norm(grads, expected_grads, 1e-5)
    assert metrics == pytest.approx(expected_metrics, rel=1e-5, abs=1e-6)
    assert 0 < metrics["value_clip_ratio" if role == "critic" else "actor_clip_ratio"] < 1
