"""What a run takes of the machine where its options leave that open."""

import pytest

from realjax.allocation.modes import check_options
from realjax.options.machine import resolve_machine
from realjax.options.parallel import allocation_options, count_asked
from realjax.options.parsing import parse_overrides
from realjax.options.rl import PPOConfig
from realjax.options.supervised import DPOConfig, SFTConfig


def resolve(*words, num_present=1, environ=None, cls=SFTConfig):
    return resolve_machine(parse_overrides(cls, words), num_present, environ or {})


@pytest.mark.parametrize("num_present", [1, 3, 8])
def test_without_options_every_device_takes_a_part_of_the_batch(num_present):
    config = resolve(num_present=num_present)
    assert (config.mode, config.n_gpus_per_node, config.allocation_mode) == (
        "local",
        num_present,
        f"d{num_present}p1m1",
    )
    check_options(allocation_options(config))
    two = resolve("n_nodes=2", num_present=num_present)
    assert two.allocation_mode == f"d{2 * num_present}p1m1"


@pytest.mark.parametrize(
    ("words", "per_node"),
    [
        (["allocation_mode=manual", "allocation.parallel.model_parallel_size=2"], 2),
        (["allocation_mode=manual", "allocation.parallel.model_parallel_size=8", "n_nodes=2"], 4),
        (
            ["allocation_mode=manual", "allocation.device_mesh=NODE01:2,3", "allocation.parallel.data_parallel_size=2"],
            4,
        ),
        (["allocation_mode=d2p1m4"], 8),
        (["allocation_mode=d4e2p1m1"], 4),
        (["allocation_mode=search"], 6),
        (["allocation_mode=pipe_model"], 6),
        (["allocation_mode=d2p1m4", "n_gpus_per_node=4"], 4),
    ],
)
def test_sizes_that_are_given_say_how_many_devices_there_are(words, per_node):
    assert resolve(*words, num_present=6).n_gpus_per_node == per_node


def test_the_largest_of_several_calls_counts_and_unused_ones_do_not():
    words = ["allocation_mode=manual", "actor_train.parallel.model_parallel_size=4"]
    assert count_asked(parse_overrides(DPOConfig, [*words, "ref_inf.parallel.data_parallel_size=8"])) == 8
    unused = [*words, "ref_inf.parallel.data_parallel_size=8", "reference_free=True"]
    assert count_asked(parse_overrides(DPOConfig, unused)) == 4
    assert count_asked(parse_overrides(PPOConfig, ["allocation_mode=heuristic"])) is None


def test_the_mode_is_that_of_the_job():
    assert resolve(environ={"SLURM_JOB_ID": "7"}).mode == "slurm"
    assert resolve(environ={"RAY_JOB_ID": "7"}).mode == "ray"
    assert resolve("mode=local", environ={"SLURM_JOB_ID": "7"}).mode == "local"
