"""DPO: the reference's log-probabilities, then a training call of the actor, each in a layout of its own."""

from functools import partial

from realjax.algorithms.dpo import make_dpo_loss
from realjax.core.draw import Draw
from realjax.core.texts import decode_answers
from realjax.dataflow.graph import DataflowGraph, Inference, Train
from realjax.dataflow.run import RunSpec
from realjax.experiments import common
from realjax.experiments.answers import answer_held_out
from realjax.options.supervised import DPOConfig


def build(config: DPOConfig) -> RunSpec:
    """Returns the run. Raises ValueError for data or models that cannot work."""
    roles = {"actor": common.describe_role("actor", config.actor, is_trained=True, merged=config.sft_adapter)}
    if not config.reference_free:
        roles["ref"] = common.describe_role("ref", config.ref, is_trained=False, merged=config.sft_adapter)
    tokenizer = common.load_tokenizer(roles["actor"].path)
    loader, held_out = common.make_loaders(config, *common.load_pairs(config, tokenizer))
    draw = Draw(num_tokens=common.num_common_tokens(roles.values()))
    reference = Inference(
        name="ref_inf",
        role="ref",
        inputs=("tokens",),
        outputs=("ref_logprobs",),
        head="logprobs",
        draw=draw,
        max_seqlen=max(one.longest for one in (loader, *held_out.values())),
        micro_batches=config.ref_inf.micro_batches,
    )
    before = () if config.reference_free else (reference,)
    train = Train(
        name="actor_train",
        role="actor",
        inputs=("tokens", "loss_mask", "pair_weight", *(key for call in before for key in call.outputs)),
        loss=make_dpo_loss(config.parameters, draw),
        max_seqlen=loader.longest,
        micro_batches=config.actor_train.micro_batches,
    )
    return common.run_spec(
        config,
        experiment="dpo",
        graph=DataflowGraph((*before, train), frozenset({"tokens", "loss_mask", "pair_weight"})),
        roles=roles,
        tokenizer=tokenizer,
        loader=loader,
        evaluations={
            **common.measure_loss(train, held_out, before),
            **answer_held_out(config, config.dataset, train, roles["actor"], tokenizer),
        },
        decode_fn=partial(decode_answers, tokenizer),
    )
