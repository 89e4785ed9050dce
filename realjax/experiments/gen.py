"""Generation: one model answers a file of prompts, each once."""

from dataclasses import replace
from functools import partial

from realjax.algorithms.responses import Responses
from realjax.algorithms.returns import answer_metrics
from realjax.core.host_call import Arrays, HostResult, State
from realjax.core.texts import decode_answers, make_stop_fn
from realjax.data.loader import Loader
from realjax.data.prompts import PromptForm, load_prompts
from realjax.dataflow.graph import DataflowGraph, Generate, Host
from realjax.dataflow.run import AnswerFile, Frequency, RunSpec
from realjax.experiments import common
from realjax.hf.generation import load_eos_ids
from realjax.options.generation import GenConfig


def build(config: GenConfig) -> RunSpec:
    """Returns the run. Raises ValueError for data or a model that cannot work."""
    role = common.describe_role("default", config.model, is_trained=False)
    tokenizer, data = common.load_tokenizer(role.path), config.dataset
    form = PromptForm(max_len=data.max_prompt_len, use_chat_template=data.use_chat_template, truncate=data.truncate)
    prompts = common.load_data(config, data, "path", lambda source: load_prompts(source, tokenizer, form))
    loader = Loader(prompts, batch_size=data.train_bs_n_seqs, seed=config.seed, in_order=True)
    answer = Generate(
        name="generate",
        role=role.name,
        inputs=("prompts",),
        outputs=("tokens", "loss_mask", "logprobs", "has_eos", "prompt_id", "group", "sample_id"),
        # Nothing is trained on these answers: what they were drawn from need not be kept.
        config=replace(config.gen, force_no_logits_mask=True),
        eos_ids=load_eos_ids(role.path, tokenizer),
        num_prompts=min(data.train_bs_n_seqs, len(prompts)),
        num_samples=config.num_samples,
        **config.gen.slots(),
        repeats=True,
        stop_fn=make_stop_fn(tokenizer, config.stop) if config.stop else None,
        max_seqlen=prompts.longest + config.gen.max_new_tokens,
        placed_as="allocation",
    )
    measures = Host(name="measures", fn=measure, inputs=("loss_mask", "logprobs", "has_eos"), outputs=())
    file = AnswerFile(
        name=config.output_file, rows=prompts.rows, num_samples=config.num_samples, stop=config.stop
    ) if config.output_file else None  # fmt: skip
    spec = common.run_spec(
        config,
        experiment="gen",
        graph=DataflowGraph((answer, measures), frozenset({"prompts"})),
        roles={role.name: role},
        tokenizer=tokenizer,
        loader=loader,
        answers=file,
        decode_fn=partial(decode_answers, tokenizer),
    )
    # Answers are kept as soon as they are there.
    return replace(spec, num_epochs=1, save=Frequency(steps=1))


def measure(arrays: Arrays, state: State) -> HostResult:
    """Returns how long answers are and how they end."""
    return HostResult(arrays={}, metrics=answer_metrics(arrays, Responses.of(arrays)))
