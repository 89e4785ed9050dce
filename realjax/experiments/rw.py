"""Reward modelling: one role, one training call on pairs of answers."""

from realjax.algorithms.rw import REWARD_LOSS
from realjax.dataflow.graph import DataflowGraph, Train
from realjax.dataflow.run import RunSpec
from realjax.experiments import common
from realjax.options.supervised import RWConfig


def build(config: RWConfig) -> RunSpec:
    """Returns the run. Raises ValueError for data or a model that cannot work."""
    role = common.describe_role("default", config.model, is_trained=True, merged=config.sft_adapter)
    tokenizer = common.load_tokenizer(role.path)
    loader, held_out = common.make_loaders(config, *common.load_pairs(config, tokenizer))
    call = Train(
        name="rwTrain",
        role="default",
        inputs=("tokens", "pair_weight"),
        loss=REWARD_LOSS,
        max_seqlen=loader.longest,
        micro_batches=config.allocation.micro_batches,
        placed_as="allocation",
    )
    return common.run_spec(
        config,
        experiment="rw",
        graph=DataflowGraph((call,), frozenset({"tokens", "loss_mask", "pair_weight"})),
        roles={role.name: role},
        tokenizer=tokenizer,
        loader=loader,
        evaluations=common.measure_loss(call, held_out),
    )
