"""KTO: log-probabilities of reference and actor, their KL on the host, then a training call of the actor."""

from realjax.algorithms.kto import KL_INPUTS, estimate_kl_baseline, make_kto_loss
from realjax.core.draw import Draw
from realjax.data.labelled import LabelledDataset, load_labelled
from realjax.dataflow.graph import DataflowGraph, Host, Inference, Train
from realjax.dataflow.run import RunSpec
from realjax.experiments import common
from realjax.options.parallel import MFCConfig
from realjax.options.supervised import KTOConfig


def build(config: KTOConfig) -> RunSpec:
    """Returns the run. Raises ValueError for data or models that cannot work."""
    roles = {
        "actor": common.describe_role("actor", config.actor, is_trained=True),
        "ref": common.describe_role("ref", config.ref, is_trained=False),
    }
    tokenizer, data = common.load_tokenizer(roles["actor"].path), config.dataset

    def load(path: str, name: str) -> LabelledDataset:
        chat = data.use_chat_template
        return load_labelled(path, tokenizer, max_seqlen=data.max_seqlen, use_chat_template=chat, name=name)

    train_set = load(data.train_path, "dataset.train_path")
    loader, held_out = common.make_loaders(config, train_set, common.load_held_out(data.valid_path, load))
    draw = Draw(num_tokens=common.num_common_tokens(roles.values()))

    def infer(name: str, role: str, key: str, options: MFCConfig, placed_as: str | None = None) -> Inference:
        return Inference(
            name=name,
            role=role,
            inputs=("tokens",),
            outputs=(key,),
            head="logprobs",
            draw=draw,
            max_seqlen=max(one.longest for one in (loader, *held_out.values())),
            micro_batches=options.micro_batches,
            placed_as=placed_as,
        )

    before = (
        infer("ref_inf", "ref", "ref_logprobs", config.ref_inf),
        infer("actor_inf", "actor", "old_logprobs", config.actor_train, placed_as="actor_train"),
        Host(name="kl_baseline", fn=estimate_kl_baseline, inputs=KL_INPUTS, outputs=("kl_baseline",)),
    )
    keys = ("tokens", "loss_mask", "pair_weight", "desirable")
    train = Train(
        name="actor_train",
        role="actor",
        inputs=(*keys, "ref_logprobs", "kl_baseline"),
        loss=make_kto_loss(config.parameters, draw),
        max_seqlen=loader.longest,
        micro_batches=config.actor_train.micro_batches,
    )
    return common.run_spec(
        config,
        experiment="kto",
        graph=DataflowGraph((*before, train), frozenset(keys)),
        roles=roles,
        tokenizer=tokenizer,
        loader=loader,
        evaluations=common.measure_loss(train, held_out, before),
    )
