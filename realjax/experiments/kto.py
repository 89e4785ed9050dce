"""KTO: log-probabilities of reference and actor, their KL on the host, then a training call of the actor."""

from dataclasses import replace
from functools import partial

from realjax.algorithms.kto import (
    KL_INPUTS,
    KL_OUTPUTS,
    KTO_INPUTS,
    estimate_kl_baseline,
    estimate_kl_baselines,
    make_kto_loss,
)
from realjax.core.draw import Draw
from realjax.core.texts import decode_answers
from realjax.data.labelled import load_labelled
from realjax.dataflow.graph import DataflowGraph, Host, Inference, Minibatches, Train
from realjax.dataflow.run import RunSpec
from realjax.experiments import common
from realjax.experiments.answers import answer_held_out
from realjax.options.supervised import KTOConfig


def build(config: KTOConfig) -> RunSpec:
    """Returns the run. Raises ValueError for data or models that cannot work."""
    roles = {
        "actor": common.describe_role("actor", config.actor, is_trained=True),
        "ref": common.describe_role("ref", config.ref, is_trained=False),
    }
    tokenizer, form = common.load_tokenizer(roles["actor"].path), common.make_form(config.dataset)
    sets = common.load_both(config, config.dataset, lambda source: load_labelled(source, tokenizer, form))
    loader, held_out = common.make_loaders(config, *sets)
    draw = Draw(num_tokens=common.num_common_tokens(roles.values()))

    longest = max(one.longest for one in (loader, *held_out.values()))
    before = list_before(config, draw, longest)
    train = Train(
        name="actor_train",
        role="actor",
        inputs=KTO_INPUTS,
        loss=make_kto_loss(config.parameters, draw),
        minibatches=Minibatches(shuffle=False),
        max_seqlen=loader.longest,
        micro_batches=config.actor_train.micro_batches,
    )
    return common.run_spec(
        config,
        experiment="kto",
        graph=DataflowGraph((*before, train), frozenset({"tokens", "loss_mask", "desirable", "is_other"})),
        roles=roles,
        tokenizer=tokenizer,
        loader=loader,
        evaluations={
            **common.measure_loss(train, held_out, before),
            **answer_held_out(config, config.dataset, train, roles["actor"], tokenizer),
        },
        decode_fn=partial(decode_answers, tokenizer),
    )


def list_before(config: KTOConfig, draw: Draw, longest: int) -> tuple[Inference | Host, ...]:
    """Returns the calls before an update, of sequences of up to `longest` tokens: both models', and their KL."""
    inference = Inference(
        name="ref_inf",
        role="ref",
        inputs=("tokens",),
        outputs=("ref_logprobs",),
        head="logprobs",
        draw=draw,
        max_seqlen=longest,
        micro_batches=config.ref_inf.micro_batches,
    )
    # Before the update only the other sequences are of interest, and in it only the answers themselves.
    of_others = replace(
        inference,
        name="actor_inf",
        role="actor",
        inputs=("tokens", "is_other"),
        outputs=("old_logprobs",),
        only="is_other",
        micro_batches=config.actor_train.micro_batches,
        placed_as="actor_train",
    )
    baseline = Host(
        name="kl_baseline",
        fn=estimate_kl_baseline,
        pool_fn=estimate_kl_baselines,
        inputs=KL_INPUTS,
        outputs=KL_OUTPUTS,
    )
    return inference, of_others, baseline
