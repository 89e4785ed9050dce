"""Reward modelling: one role, one training call on pairs of answers."""

from collections.abc import Sequence

import jax

from realjax.algorithms.rw import REWARD_LOSS
from realjax.dataflow.graph import MFC, DataflowGraph
from realjax.dataflow.run import RunSpec
from realjax.experiments import common
from realjax.options.supervised import RWConfig


def build(config: RWConfig, devices: Sequence[jax.Device]) -> RunSpec:
    """Returns the run. Raises ValueError for data, model or layout that cannot work, before anything is allocated."""
    role = common.role_spec("default", config.model, devices, is_trained=True)
    layout = common.call_layout("allocation", config, config.allocation, config.model, devices, is_train=True)
    tokenizer = common.load_tokenizer(role.path)
    loader, held_out = common.make_loaders(
        config,
        *common.load_pairs(config.dataset, tokenizer),
        num_shards=layout.strategy.dp,
        row_multiple=common.row_multiple(config.allocation, layout),
    )
    mfc = MFC(
        name="rwTrain",
        role="default",
        call="train_step",
        inputs=("tokens", "pair_weight"),
        loss=REWARD_LOSS,
        max_seqlen=loader.longest,
        **common.micro_batches(config.allocation),
    )
    return common.run_spec(
        config,
        experiment="rw",
        graph=DataflowGraph((mfc,), frozenset({"tokens", "loss_mask", "pair_weight"})),
        layouts={mfc.name: layout},
        roles={role.name: role},
        tokenizer=tokenizer,
        loader=loader,
        evaluation=held_out and common.evaluation_of(mfc, held_out),
    )
