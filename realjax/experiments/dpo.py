"""DPO: the reference's log-probabilities, then a training call of the actor, each in a layout of its own."""

import math
from collections.abc import Sequence

import jax

from realjax.algorithms.dpo import make_dpo_loss
from realjax.core.draw import Draw
from realjax.dataflow.graph import MFC, DataflowGraph
from realjax.dataflow.run import RunSpec
from realjax.experiments import common
from realjax.options.supervised import DPOConfig


def build(config: DPOConfig, devices: Sequence[jax.Device]) -> RunSpec:
    """Returns the run. Raises ValueError for data, model or layout that cannot work, before anything is allocated."""
    actor = common.role_spec("actor", config.actor, devices, is_trained=True)
    train_layout = common.call_layout("actor_train", config, config.actor_train, config.actor, devices, is_train=True)
    layouts, roles, ref_multiple = {"actor_train": train_layout}, {"actor": actor}, 1
    if not config.reference_free:
        roles["ref"] = common.role_spec("ref", config.ref, devices, is_trained=False)
        layouts["ref_inf"] = common.call_layout("ref_inf", config, config.ref_inf, config.ref, devices, is_train=False)
        ref_multiple = common.row_multiple(config.ref_inf, layouts["ref_inf"])
    # The same rows serve both calls, so they divide over both layouts.
    multiple = math.lcm(common.row_multiple(config.actor_train, train_layout), ref_multiple)
    tokenizer = common.load_tokenizer(actor.path)
    loader, held_out = common.make_loaders(
        config,
        *common.load_pairs(config.dataset, tokenizer),
        num_shards=train_layout.strategy.dp,
        row_multiple=multiple,
    )
    draw = Draw(num_tokens=common.num_common_tokens(roles.values()))
    loss = make_dpo_loss(config.parameters, draw)
    reference = MFC(
        name="ref_inf",
        role="ref",
        call="inference",
        inputs=("tokens",),
        outputs=("ref_logprobs",),
        head="logprobs",
        draw=draw,
        max_seqlen=max(one.longest for one in (loader, held_out) if one),
        **common.micro_batches(config.ref_inf),
    )
    before = () if config.reference_free else (reference,)
    actor_train = MFC(
        name="actor_train",
        role="actor",
        call="train_step",
        inputs=("tokens", "loss_mask", "pair_weight", *(key for mfc in before for key in mfc.outputs)),
        loss=loss,
        max_seqlen=loader.longest,
        **common.micro_batches(config.actor_train),
    )
    return common.run_spec(
        config,
        experiment="dpo",
        graph=DataflowGraph((*before, actor_train), frozenset({"tokens", "loss_mask", "pair_weight"})),
        layouts=layouts,
        roles=roles,
        tokenizer=tokenizer,
        loader=loader,
        evaluation=held_out and common.evaluation_of(actor_train, held_out, before),
    )
