"""What learns from pairs of answers without a reference: one training call."""

from collections.abc import Callable
from functools import partial

from realjax.core.draw import Draw
from realjax.core.loss import Loss
from realjax.core.texts import decode_answers
from realjax.dataflow.graph import DataflowGraph, Train
from realjax.dataflow.run import RunSpec
from realjax.experiments import common
from realjax.experiments.answers import answer_held_out
from realjax.options.supervised import PairsConfig


def build_on_pairs(experiment: str, config: PairsConfig, make_loss: Callable[[Draw], Loss]) -> RunSpec:
    """Returns the run of one training call on pairs of answers; ValueError for data or a model that cannot work."""
    role = common.describe_role("actor", config.actor, is_trained=True)
    tokenizer = common.load_tokenizer(role.path)
    loader, held_out = common.make_loaders(config, *common.load_pairs(config, tokenizer))
    train = Train(
        name="actor_train",
        role="actor",
        inputs=("tokens", "loss_mask", "pair_weight"),
        loss=make_loss(Draw(num_tokens=role.config.vocab_size)),
        max_seqlen=loader.longest,
        micro_batches=config.actor_train.micro_batches,
    )
    return common.run_spec(
        config,
        experiment=experiment,
        graph=DataflowGraph((train,), frozenset(train.inputs)),
        roles={role.name: role},
        tokenizer=tokenizer,
        loader=loader,
        evaluations={
            **common.measure_loss(train, held_out),
            **answer_held_out(config, config.dataset, train, role, tokenizer),
        },
        decode_fn=partial(decode_answers, tokenizer),
    )
