"""Supervised fine-tuning: one role, one training call."""

from dataclasses import replace
from functools import partial

from realjax.algorithms.sft import SFT_LOSS
from realjax.core.texts import decode_answers
from realjax.data.datasets import load_prompt_answer
from realjax.data.sequences import SequenceForm
from realjax.dataflow.graph import DataflowGraph, Train
from realjax.dataflow.run import RunSpec
from realjax.experiments import common
from realjax.experiments.answers import answer_held_out
from realjax.options.supervised import SFTConfig


def build(config: SFTConfig) -> RunSpec:
    """Returns the run. Raises ValueError for data or a model that cannot work."""
    role = common.describe_role("default", config.model, is_trained=True)
    tokenizer, data = common.load_tokenizer(role.path), config.dataset

    form = SequenceForm(
        max_seqlen=data.max_seqlen,
        use_chat_template=data.use_chat_template,
        turns=data.turns,
        truncate=data.truncate,
    )
    padded = replace(form, pad_to_max_length=data.pad_to_max_length)
    train = common.load_data(config, data, "train_path", partial(load_prompt_answer, tokenizer=tokenizer, form=padded))
    valid = common.load_held_out(config, data, partial(load_prompt_answer, tokenizer=tokenizer, form=form))
    loader, held_out = common.make_loaders(config, train, valid)
    call = Train(
        name="trainDefault",
        role="default",
        inputs=("tokens", "loss_mask"),
        loss=SFT_LOSS,
        max_seqlen=loader.longest,
        micro_batches=config.allocation.micro_batches,
        placed_as="allocation",
    )
    return common.run_spec(
        config,
        experiment="sft",
        graph=DataflowGraph((call,), frozenset({"tokens", "loss_mask"})),
        roles={role.name: role},
        tokenizer=tokenizer,
        loader=loader,
        evaluations={
            **common.measure_loss(call, held_out),
            **answer_held_out(config, data, call, role, tokenizer),
        },
        decode_fn=partial(decode_answers, tokenizer),
    )
