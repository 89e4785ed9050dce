"""A model's own answers in a run's record: those that it learns from, and some before and after other training."""

from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from realjax.core.generation_config import GenerationConfig
from realjax.data.loader import Loader
from realjax.data.prompts import PromptForm, load_prompts
from realjax.dataflow.graph import Generate, Train
from realjax.dataflow.run import RoleSpec, RolloutEvaluation, RolloutRecord, join_names
from realjax.experiments import common
from realjax.hf.generation import load_eos_ids
from realjax.options.datasets import (
    LabelledAnswerDatasetConfig,
    PairedComparisonDatasetConfig,
    PromptAnswerDatasetConfig,
)
from realjax.options.evaluation import RolloutOptions
from realjax.options.supervised import AnsweringConfig

SAMPLES = "samples"  # the set of prompts that are answered before and after a training
Data = PromptAnswerDatasetConfig | PairedComparisonDatasetConfig | LabelledAnswerDatasetConfig


def record_rollouts(options: RolloutOptions, terms: tuple[str, ...] = ()) -> RolloutRecord:
    """Returns what is shown and kept of a run's answers, whose rewards have these terms."""
    return RolloutRecord(
        log_steps=options.log_freq_steps, num_logged=options.num_logged, keeps_all=options.keep, terms=terms
    )


def answer_held_out(
    config: AnsweringConfig, data: Data, train: Train, role: RoleSpec, tokenizer: PreTrainedTokenizerBase
) -> dict[str, RolloutEvaluation]:
    """Returns the drawing of answers to held-out prompts before and after the training; nothing where none is asked
    for. It runs where the role is trained."""
    options = config.samples
    if not options.num_prompts:
        return {}
    form = PromptForm(max_len=data.max_seqlen, use_chat_template=data.use_chat_template)
    prompts = common.load_held_out(
        config, data, lambda source: load_prompts(replace(source, max_rows=options.num_prompts), tokenizer, form)
    )
    longest = max(one.longest for one in prompts.values())
    answer = Generate(
        name="samples",
        role=role.name,
        inputs=("prompts",),
        outputs=("tokens", "loss_mask", "logprobs", "has_eos", "prompt_id", "group", "sample_id"),
        config=GenerationConfig(greedy=True, max_new_tokens=options.max_new_tokens, force_no_logits_mask=True),
        eos_ids=load_eos_ids(role.path, tokenizer),
        num_prompts=max(map(len, prompts.values())),
        num_tokens=role.config.vocab_size,
        max_seqlen=longest + options.max_new_tokens,
        placed_as=train.placement,
    )
    return {
        join_names(name, SAMPLES): RolloutEvaluation(
            role=role.name,
            variants={"greedy": (answer,)},
            loader=Loader(one, batch_size=len(one), seed=config.seed, in_order=True),
            is_for_ends=True,
        )
        for name, one in prompts.items()
    }
