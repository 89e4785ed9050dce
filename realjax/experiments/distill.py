"""Distillation: the actor answers, a teacher says what it would have said at each token, and the actor learns it."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice

import numpy as np
from transformers import PreTrainedTokenizerBase

from realjax.algorithms.distill import DISTILL_INPUTS, make_distill_loss, make_draw
from realjax.algorithms.responses import Responses
from realjax.algorithms.returns import answer_metrics
from realjax.core.host_call import Arrays, HostResult, State
from realjax.core.json_text import JsonObject
from realjax.core.texts import decode_answers
from realjax.data.chat import Template
from realjax.data.datasets import load_prompt_answer, make_passages
from realjax.data.loader import Loader
from realjax.data.mixture import Mixture
from realjax.data.prompts import PromptDataset, PromptForm, load_prompts
from realjax.data.sequences import SequenceForm, make_sequences
from realjax.dataflow.graph import DataflowGraph, Generate, Host, Inference, Minibatches, Train
from realjax.dataflow.run import RunSpec
from realjax.experiments import common
from realjax.experiments.answers import record_rollouts
from realjax.hf.generation import load_eos_ids
from realjax.options.distill import DistillConfig

MOST_BYTES = 2**33  # of a step's distributions on the host
UNCUT = 2**24  # tokens
GivenFn = Callable[[int, int], np.ndarray | None]


def build(config: DistillConfig) -> RunSpec:
    """Returns the run. Raises ValueError for data or models that cannot work."""
    roles = {
        "actor": common.describe_role("actor", config.actor, is_trained=True),
        "teacher": common.describe_role("teacher", config.teacher, is_trained=False),
    }
    tokenizer, options, data = common.load_tokenizer(roles["actor"].path), config.distill, config.dataset
    num_tokens = common.num_common_tokens(roles.values())
    prompts = _load_prompts(config, tokenizer)
    held_out = _load_held_out(config, tokenizer)
    answer = Generate(
        name="actor_gen",
        role="actor",
        inputs=("prompts",),
        outputs=("tokens", "loss_mask", "logprobs", "has_eos", "prompt_id", "group", "sample_id"),
        config=replace(options.gen, force_no_logits_mask=True),
        eos_ids=load_eos_ids(roles["actor"].path, tokenizer),
        num_prompts=data.train_bs_n_seqs,
        num_samples=config.group_size,
        **options.gen.slots(),
        num_tokens=num_tokens,
        given_fn=_make_given_fn(config, prompts, tokenizer) if options.data_share > 0 else None,
        max_seqlen=prompts.longest + options.gen.max_new_tokens,
    )
    teacher = Inference(
        name="teacher_inf",
        role="teacher",
        inputs=("tokens", "loss_mask"),
        outputs=("teacher_ids", "teacher_logprobs"),
        head="choices",
        mask="loss_mask",
        draw=make_draw(options, num_tokens),
        num_choices=_count_choices(config, num_tokens, answer.num_answers * (answer.max_seqlen or 0)),
        max_seqlen=max([answer.max_seqlen or 0, *(one.longest for one in held_out.values())]),
        micro_batches=config.teacher_inf.micro_batches,
    )
    measures = Host(name="measures", fn=measure, inputs=("loss_mask", "logprobs", "has_eos"), outputs=())
    train = Train(
        name="actor_train",
        role="actor",
        inputs=DISTILL_INPUTS,
        loss=make_distill_loss(options, num_tokens),
        mask="loss_mask",
        minibatches=Minibatches(count=options.n_minibatches),
        max_seqlen=answer.max_seqlen,
        micro_batches=config.actor_train.micro_batches,
    )
    return common.run_spec(
        config,
        experiment="distill",
        graph=DataflowGraph((answer, measures, teacher, train), frozenset({"prompts"})),
        roles=roles,
        tokenizer=tokenizer,
        loader=Loader(
            prompts, batch_size=data.train_bs_n_seqs, num_epochs=config.exp_ctrl.total_train_epochs, seed=config.seed
        ).first_steps(config.exp_ctrl.max_steps),
        evaluations=common.measure_loss(train, held_out, (teacher,)),
        rollouts=record_rollouts(config.rollouts),
        decode_fn=partial(decode_answers, tokenizer),
    )


def _load_prompts(config: DistillConfig, tokenizer: PreTrainedTokenizerBase) -> PromptDataset | Mixture:
    data, needs_answers = config.dataset, config.distill.data_share > 0
    form = PromptForm(
        max_len=data.max_prompt_len,
        use_chat_template=data.use_chat_template,
        truncate=data.truncate,
        pad_to_max_length=data.pad_to_max_length,
    )
    check_fn = _check_answer if needs_answers else None
    return common.load_data(
        config, data, "path", lambda source: load_prompts(source, tokenizer, form, check_fn=check_fn)
    )


def measure(arrays: Arrays, state: State) -> HostResult:
    """Returns how long answers are and how they end."""
    return HostResult(arrays={}, metrics=answer_metrics(arrays, Responses.of(arrays)))


def _check_answer(row: JsonObject, place: str) -> None:
    if not isinstance(row.get("answer"), str):
        raise ValueError(
            f"{place}: found no 'answer'; distill.data_share above 0 needs a string there, or set data_share to 0"
        )


def _load_held_out(config: DistillConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Loader]:
    """Returns the loaders of held-out prompts with the data's answers, cut as those of training are."""
    data = config.dataset
    max_seqlen = data.max_prompt_len + config.distill.gen.max_new_tokens
    form = SequenceForm(max_seqlen=max_seqlen, use_chat_template=data.use_chat_template)
    sets = common.load_held_out(config, data, lambda source: load_prompt_answer(source, tokenizer, form))
    return {name: common.load_in_order(one, config, data.train_bs_n_seqs) for name, one in sets.items()}


def _make_given_fn(
    config: DistillConfig, prompts: PromptDataset | Mixture, tokenizer: PreTrainedTokenizerBase
) -> GivenFn:
    """Returns which answers are the data's: of prompt and sample, by the seed, the share that was asked for."""
    share, most, seed = config.distill.data_share, config.distill.gen.max_new_tokens, config.seed
    form = SequenceForm(max_seqlen=UNCUT, use_chat_template=config.dataset.use_chat_template)
    parts = prompts.parts if isinstance(prompts, Mixture) else (prompts,)
    rows = iter(prompts.rows)
    sources = [list(islice(rows, len(part))) for part in parts]
    answers = [tokens[:most] for source in sources for tokens in _find_answers(source, tokenizer, form)]

    def find(row_id: int, sample_id: int) -> np.ndarray | None:
        return answers[row_id] if np.random.default_rng((seed, row_id, sample_id)).random() < share else None

    return find


def _find_answers(
    rows: list[JsonObject], tokenizer: PreTrainedTokenizerBase, form: SequenceForm
) -> Iterator[np.ndarray]:
    """Yields the tokens of each row's answer, which follow those of its prompt as `load_prompts` makes them."""
    is_chat = isinstance(rows[0]["prompt"], list) if form.use_chat_template is None else form.use_chat_template
    template = Template(tokenizer=tokenizer, subject="dataset.path") if is_chat else None
    passages = make_passages(rows, template, form)
    for sequence in make_sequences(passages, tokenizer, max_seqlen=form.max_seqlen):
        yield sequence.tokens[sequence.answer_start :]


def _count_choices(config: DistillConfig, num_tokens: int, num_positions: int) -> int:
    """Returns the tokens that are told apart. Raises ValueError where all of them are too many."""
    if (top_k := config.distill.top_k) is not None:
        return min(top_k, num_tokens)
    if (num_bytes := 8 * num_tokens * num_positions) > MOST_BYTES:
        raise ValueError(
            f"distill.top_k: found null, which keeps the teacher's distribution over {num_tokens} tokens for each of "
            f"up to {num_positions} tokens of a step, {num_bytes / 2**30:.0f} GiB; at most {MOST_BYTES >> 30} GiB are "
            "kept: set top_k, or lower dataset.train_bs_n_seqs"
        )
    return num_tokens
