"""What a run fills up so that its layouts fit its models."""

from typing import Any

import pytest

from tests.given.checkpoints import write_llama
from tests.given.runs import build_rl_spec, make_plan

LAYERS = 3
STAGES: dict[str, Any] = {
    "n_gpus_per_node": 2,
    "allocation_mode": "manual",
    "actor_gen__parallel__pipeline_parallel_size": 2,
    "actor_train__parallel__data_parallel_size": 2,
    "ref_inf__parallel__model_parallel_size": 2,
    "rew_inf__parallel__data_parallel_size": 2,
    "critic_inf__parallel__data_parallel_size": 2,
    "critic_train__parallel__data_parallel_size": 2,
}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model of three layers, for every role."""
    model = write_llama(tmp_path_factory.mktemp("stages") / "three", num_hidden_layers=LAYERS)
    return {f"{role}__path": model for role in ("actor", "critic", "ref", "rew")}


def empty_layers(*args, **changes) -> dict[str, int]:
    """Returns the empty layers of the roles that have any, in the plan of a run with these options."""
    plan = make_plan(build_rl_spec(*args, **changes))
    return {name: number for name, number in plan.empty_layers.items() if number}


def test_a_model_has_the_empty_layers_that_its_own_calls_need(given, three, tmp_path):
    assert not empty_layers(given, tmp_path, **three)
    assert empty_layers(given, tmp_path, **three, **STAGES) == {"actor": 1}
    critic: dict[str, Any] = {
        "critic_inf__parallel__data_parallel_size": 1,
        "critic_inf__parallel__pipeline_parallel_size": 2,
    }
    assert empty_layers(given, tmp_path, **three, **STAGES | critic) == {"actor": 1, "critic": 1}


def test_a_role_that_follows_another_has_the_same_stack(given, three, tmp_path):
    assert empty_layers(given, tmp_path, **three, **STAGES, algo__ref_ema_eta=0.5) == {"actor": 1, "ref": 1}


def test_more_stages_than_layers_are_refused(given, three, tmp_path):
    changes = {"n_gpus_per_node": 4, "allocation_mode": "d1p4m1"}
    with pytest.raises(
        ValueError, match=r"^actor_gen: 4 pipeline stages, but actor's model has 3 layers; use a pipeline"
    ):
        build_rl_spec(given, tmp_path, **three, **changes)
