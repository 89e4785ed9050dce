"""Supervised fine-tuning: one role, one training call."""

from realjax.algorithms.sft import SFT_LOSS
from realjax.data.datasets import PromptAnswerDataset, load_prompt_answer
from realjax.dataflow.graph import DataflowGraph, Train
from realjax.dataflow.run import RunSpec
from realjax.experiments import common
from realjax.options.supervised import SFTConfig


def build(config: SFTConfig) -> RunSpec:
    """Returns the run. Raises ValueError for data or a model that cannot work."""
    role = common.describe_role("default", config.model, is_trained=True)
    tokenizer, data = common.load_tokenizer(role.path), config.dataset

    def load(path: str, name: str, *, pad_to_max_length: bool = False) -> PromptAnswerDataset:
        return load_prompt_answer(
            path,
            tokenizer,
            max_seqlen=data.max_seqlen,
            pad_to_max_length=pad_to_max_length,
            use_chat_template=data.use_chat_template,
            name=name,
        )

    train = load(data.train_path, "dataset.train_path", pad_to_max_length=data.pad_to_max_length)
    loader, held_out = common.make_loaders(config, train, common.load_held_out(data.valid_path, load))
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
        evaluations=common.measure_loss(call, held_out),
    )
