"""Supervised fine-tuning: one role, one training call."""

from collections.abc import Sequence

import jax

from realjax.algorithms.sft import SFT_LOSS
from realjax.data.datasets import load_prompt_answer
from realjax.dataflow.graph import MFC, DataflowGraph
from realjax.dataflow.run import RunSpec
from realjax.experiments import common
from realjax.options.supervised import SFTConfig


def build(config: SFTConfig, devices: Sequence[jax.Device]) -> RunSpec:
    """Returns the run. Raises ValueError for data, model or layout that cannot work, before anything is allocated."""
    role = common.role_spec("default", config.model, devices, is_trained=True)
    layout = common.call_layout("allocation", config, config.allocation, config.model, devices, is_train=True)
    tokenizer = common.load_tokenizer(role.path)
    data, dp, num_mbs = config.dataset, layout.strategy.dp, config.allocation.n_mbs or 1
    if data.train_bs_n_seqs < dp * num_mbs:
        raise ValueError(
            f"dataset.train_bs_n_seqs: {data.train_bs_n_seqs} sequences cannot be divided over {dp} data-parallel "
            f"devices x {num_mbs} micro-batches; use at least {dp * num_mbs}"
        )
    train = load_prompt_answer(
        data.train_path,
        tokenizer,
        max_seqlen=data.max_seqlen,
        pad_to_max_length=data.pad_to_max_length,
        use_chat_template=data.use_chat_template,
        name="dataset.train_path",
    )
    valid = None
    if data.valid_path:
        valid = load_prompt_answer(
            data.valid_path,
            tokenizer,
            max_seqlen=data.max_seqlen,
            use_chat_template=data.use_chat_template,
            name="dataset.valid_path",
        )
    loader, held_out = common.make_loaders(
        config,
        train,
        valid,
        num_shards=dp,
        row_multiple=common.row_multiple(config.allocation, layout),
    )
    mfc = MFC(
        name="trainDefault",
        role="default",
        call="train_step",
        inputs=("tokens", "loss_mask"),
        loss=SFT_LOSS,
        max_seqlen=loader.longest,
        **common.micro_batches(config.allocation),
    )
    return common.run_spec(
        config,
        experiment="sft",
        graph=DataflowGraph((mfc,), frozenset({"tokens", "loss_mask"})),
        layouts={mfc.name: layout},
        roles={role.name: role},
        tokenizer=tokenizer,
        loader=loader,
        evaluation=held_out and common.evaluation_of(mfc, held_out),
    )
