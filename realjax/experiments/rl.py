"""What the algorithms share that learn from rewards of their own answers: prompts -> answers -> rewards -> update."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np

from realjax.algorithms.policy import PolicyParameters, make_policy_loss
from realjax.algorithms.returns import Responses, rollout_metrics
from realjax.allocation.heuristic import Placement, SizedModel, place_grpo
from realjax.core.draw import Draw
from realjax.core.host_call import Arrays, HostFn, HostResult, State
from realjax.core.layout import Layout
from realjax.core.texts import decode_answers
from realjax.data.loader import Loader
from realjax.data.packing import MOST_TOKENS, rollout_row_len
from realjax.data.prompts import PromptDataset, load_prompts
from realjax.dataflow.graph import MFC, DataflowGraph, HostCall, Minibatches, Sampling
from realjax.dataflow.run import MovingAverage, RoleSpec, RolloutEvaluation, RunSpec
from realjax.experiments import common
from realjax.hf.files import resolve_model_path
from realjax.hf.fingerprint import fingerprint_model
from realjax.hf.generation import load_eos_ids
from realjax.hf.load import load_config
from realjax.options.parallel import MFCConfig
from realjax.options.rl import RLConfig
from realjax.rewards.classifier import load_classifier
from realjax.rewards.mix import (
    MODEL_REWARD_INPUTS,
    REWARD_OUTPUTS,
    RewardSource,
    make_model_reward,
    mix_rewards,
    mixed_inputs,
)
from realjax.rewards.text import TEXT_REWARD_INPUTS, TextFn, check_row, load_function, make_text_reward

logger = logging.getLogger("realjax.rl")
ROLLOUT_KEYS = ("tokens", "loss_mask", "logprobs", "has_eos", "prompt_id", "group", "sample_id")

# place(models by role, n_nodes=, n_gpus_per_node=) -> placements by call: the rules of allocation_mode=heuristic.
PlaceFn = Callable[..., dict[str, Placement]]


class Setup:
    """An RL experiment's models, data and layouts, checked; and the calls that all of them make."""

    def __init__(
        self, config: RLConfig, devices: Sequence[jax.Device], roles_by_call: Mapping[str, str], place_fn: PlaceFn
    ) -> None:
        """Raises ValueError for data, models or layouts that cannot work; nothing is allocated."""
        self.config, self.options = config, config.algorithm.resolved()
        self.roles_by_call = {call: role for call, role in roles_by_call.items() if role not in config.unused}
        trained = {role for call, role in self.roles_by_call.items() if call.endswith("_train")}
        self.roles = {
            name: self._role(name, devices, is_trained=name in trained)
            for name in dict.fromkeys(self.roles_by_call.values())
        }
        self.models = {name: load_config(role.path) for name, role in self.roles.items()}
        self.tokenizer = common.load_tokenizer(self.roles["actor"].path)
        self.layouts = self._layouts(devices, place_fn)
        common.check_slots(self.options.gen.num_slots, self.layouts["actor_gen"], "gen.num_slots")
        self.prompts, self.held_out = self._load_prompts()
        self.longest = (
            max(one.longest for one in (self.prompts, self.held_out) if one) + self.options.gen.max_new_tokens
        )
        self.eos_ids = load_eos_ids(self.roles["actor"].path, self.tokenizer)
        self.num_tokens = common.num_common_tokens(self.roles.values())
        self.draw = replace(self._draw(), num_tokens=self.num_tokens)

    def _draw(self) -> Draw:
        """Returns what tokens are drawn from; says where that is not what ratios will be of."""
        gen, num_eos = self.options.gen, len(self.eos_ids)
        draw, recorded = (
            Draw.of(config, self.num_tokens, num_eos) for config in (gen, replace(gen, force_no_logits_mask=False))
        )
        if draw != recorded and not self.options.recompute_logprobs:
            logger.warning(
                "gen.force_no_logits_mask: which tokens top_k, top_p and min_new_tokens left is not recorded, so ratio "
                "and KL compare the distribution of the draw with one over all tokens, and start away from 1 and 0; "
                "leave it out, or set recompute_logprobs=True, which compares like with like"
            )
        return draw

    def _role(self, name: str, devices: Sequence[jax.Device], *, is_trained: bool) -> RoleSpec:
        role = common.role_spec(name, getattr(self.config, name), devices, is_trained=is_trained)
        return replace(role, is_averaged=name == "ref" and self.options.ref_ema_eta is not None)

    def _layouts(self, devices: Sequence[jax.Device], place_fn: PlaceFn) -> dict[str, Layout]:
        config = self.config
        if config.allocation_mode == "heuristic":
            sized = {
                name: SizedModel(size=getattr(config, name).type.size, config=model)
                for name, model in self.models.items()
            }
            places = place_fn(sized, n_nodes=config.n_nodes, n_gpus_per_node=config.n_gpus_per_node)
            return {call: self._placed(call, places[call], devices) for call in self.roles_by_call}
        return {
            call: common.call_layout(
                call,
                config,
                getattr(config, call),
                getattr(config, role),
                devices,
                is_train=call.endswith("_train"),
            )
            for call, role in self.roles_by_call.items()
        }

    def _placed(self, call: str, place: Placement, devices: Sequence[jax.Device]) -> Layout:
        is_train = call.endswith("_train")
        zero_stage = getattr(self.config, self.roles_by_call[call]).zero_stage if is_train else 0
        return Layout(replace(place.strategy, zero_stage=zero_stage), tuple(devices[i] for i in place.devices))

    def _load_prompts(self) -> tuple[PromptDataset, PromptDataset | None]:
        data = self.config.dataset

        def load(path: str, name: str, **changes: Any) -> PromptDataset:
            chat = data.use_chat_template
            return load_prompts(
                path,
                self.tokenizer,
                max_prompt_len=data.max_prompt_len,
                use_chat_template=chat,
                check_fn=self._check_row,
                name=name,
                **changes,
            )

        train = load(data.path, "dataset.path", pad_to_max_length=data.pad_to_max_length)
        if not data.valid_path:
            return train, None
        return train, load(data.valid_path, "dataset.valid_path", max_prompts=self.config.eval.num_prompts)

    def _check_row(self, row: dict[str, Any], place: str) -> None:
        """Raises ValueError for a row that a reward says it cannot score."""
        for name, fn in self._text_functions.items():
            check_row(fn, row, place, name=f"reward.{name} {getattr(self.config.reward, name)}")

    def loader(self) -> Loader:
        """Returns the loader of prompts."""
        data, control = self.config.dataset, self.config.exp_ctrl
        return Loader(
            self.prompts, batch_size=data.train_bs_n_seqs, num_epochs=control.total_train_epochs, seed=self.config.seed
        )

    def generate(self, *, has_baseline: bool = False) -> MFC:
        """Returns the call by which the actor answers a step's prompts."""
        own = (*(("kept",) if self.draw.kept else ()), *(("is_baseline",) if has_baseline else ()))
        sampling = Sampling(
            config=self.options.gen,
            eos_ids=self.eos_ids,
            row_len=self._row_len(self.config.num_samples + has_baseline),
            num_samples=self.config.num_samples,
            num_slots=self.options.gen.num_slots,
            has_baseline=has_baseline,
            num_tokens=self.num_tokens,
        )
        return MFC(
            name="actor_gen",
            role="actor",
            call="generate",
            inputs=("prompts",),
            outputs=(*ROLLOUT_KEYS, *own),
            sampling=sampling,
            max_seqlen=self.longest,
        )

    def _row_len(self, answers_per_prompt: int) -> int:
        multiples = [common.row_multiple(self._call_options(call), layout) for call, layout in self.layouts.items()]
        multiple, num_answers = math.lcm(*multiples), self.config.dataset.train_bs_n_seqs * answers_per_prompt
        if (num_tokens := max(num_answers, multiple) * self.longest) > MOST_TOKENS:
            raise ValueError(
                f"dataset.train_bs_n_seqs: {num_answers} answers a step, in rows that are a multiple of {multiple} "
                f"(devices times n_mbs), of up to {self.longest} tokens are {num_tokens} tokens, but a step has at "
                f"most {MOST_TOKENS}; lower it, the answers to each prompt, n_mbs or gen.max_new_tokens"
            )
        return rollout_row_len(self.longest, num_answers // self.options.ppo_n_minibatches, multiple)

    def _call_options(self, call: str) -> MFCConfig:
        return getattr(self.config, call)

    def infer(self, call: str, key: str, head: str, *, options: str | None = None) -> MFC:
        """Returns an inference call whose head's output becomes `key`; `options` is the call whose options it has."""
        draw, mask = (self.draw, "loss_mask") if head == "logprobs" else (Draw(), None)
        return MFC(
            name=call,
            role=self.roles_by_call.get(call, "actor"),
            call="inference",
            inputs=("tokens", *((mask,) if mask else ()), *(("kept",) if draw.kept else ())),
            outputs=(key,),
            head=head,
            mask=mask,
            draw=draw,
            max_seqlen=self.longest,
            **common.micro_batches(self._call_options(options or call)),
        )

    def references(self) -> tuple[MFC, ...]:
        """Returns the calls that compute log-probabilities anew: the reference's, and the actor's own if asked for."""
        ref = (self.infer("ref_inf", "ref_logprobs", "logprobs"),) if "ref" in self.roles else ()
        if not self.options.recompute_logprobs:
            return ref
        return (*ref, self.infer("actor_inf", "old_logprobs", "logprobs", options="actor_train"))

    def rewards(self, prompts: PromptDataset | None = None) -> tuple[MFC | HostCall, ...]:
        """Returns the calls that give every answer a reward; `prompts` are the training prompts or others."""
        config, options = self.config.reward, self.options
        rows = (prompts or self.prompts).rows
        text = partial(make_text_reward, tokenizer=self.tokenizer, rows=rows)
        sources: list[RewardSource] = []
        if "rew" in self.roles:
            fn = make_model_reward(scaling=options.reward_output_scaling, bias=options.reward_output_bias)
            parts = {"inputs": MODEL_REWARD_INPUTS, "weight": config.model_weight, "title": self.roles["rew"].title}
            sources.append(RewardSource(name="model", fn=fn, **parts))
        for name, fn in self._text_functions.items():
            title = f"reward.{name} {getattr(config, name)}"
            parts = {"inputs": TEXT_REWARD_INPUTS, "weight": getattr(config, f"{name}_weight"), "title": title}
            sources.append(RewardSource(name=name, fn=text(fn, name=title), **parts))
        scores = (self.infer("rew_inf", "scores", "values"),) if "rew" in self.roles else ()
        inputs = mixed_inputs(sources)
        metrics = tuple(f"reward/{source.name}" for source in sources)
        mixed = HostCall(
            name="rewards", fn=mix_rewards(sources), inputs=inputs, outputs=REWARD_OUTPUTS, metrics=metrics
        )
        return (*scores, mixed)

    @cached_property
    def _text_functions(self) -> dict[str, TextFn]:
        """The rewards that read texts, by the option that names them."""
        config, functions = self.config.reward, {}
        if config.fn:
            functions["fn"] = load_function(config.fn)
        if config.classifier:
            options = {"label": config.classifier_label, "with_eos": config.classifier_eos}
            functions["classifier"] = load_classifier(config.classifier, **options)
        return functions

    def advantages(self, fn: HostFn) -> HostCall:
        """Returns the host call that turns rewards into advantages."""
        return HostCall(
            name="advantages", fn=fn, inputs=self.options.advantage_inputs, outputs=self.options.ADVANTAGE_OUTPUTS
        )

    def train(self, call: str, loss: Any, inputs: tuple[str, ...]) -> MFC:
        """Returns a training call, in the minibatches that the options ask for."""
        kept = ("kept",) if loss.draw.kept else ()
        options = self.options
        minibatches = Minibatches(
            count=options.ppo_n_minibatches, passes=options.ppo_epochs, shuffle=options.shuffle_minibatches
        )
        return MFC(
            name=call,
            role=self.roles_by_call[call],
            call="train_step",
            inputs=(*inputs, *kept),
            loss=loss,
            mask="train_mask" if loss.head == "logprobs" else None,
            minibatches=minibatches,
            max_seqlen=self.longest,
            **common.micro_batches(self._call_options(call)),
        )

    def train_actor(self) -> MFC:
        """Returns the actor's training call."""
        return self.train("actor_train", make_policy_loss(self.options, self.draw), self.options.actor_inputs)

    def run_spec(self, experiment: str, calls: Sequence[MFC | HostCall]) -> RunSpec:
        """Returns the run of these calls."""
        layouts = dict(self.layouts)
        if self.options.recompute_logprobs:
            layouts["actor_inf"] = layouts["actor_train"]
        evaluation = self._evaluation()
        if evaluation:
            layouts |= {f"{variant}_gen": layouts["actor_gen"] for variant in evaluation.variants}
        eta = self.options.ref_ema_eta
        return common.run_spec(
            self.config,
            experiment=experiment,
            graph=DataflowGraph(tuple(calls), frozenset({"prompts"})),
            layouts=layouts,
            roles=self.roles,
            tokenizer=self.tokenizer,
            loader=self.loader(),
            evaluation=evaluation,
            averages=() if eta is None else (MovingAverage(role="ref", source="actor", eta=eta),),
            contents=self._contents(evaluation),
            decode_fn=partial(decode_answers, self.tokenizer),
        )

    def _contents(self, evaluation: RolloutEvaluation | None) -> dict[str, str]:
        """Returns digests of what decides about the run beside its models and prompts."""
        contents = {}
        if self.config.reward.classifier:
            contents["reward.classifier"] = fingerprint_model(resolve_model_path(self.config.reward.classifier))
        if evaluation and evaluation.best_metric is not None:
            contents["set of held-out prompts"] = evaluation.loader.fingerprint
        return contents

    def _evaluation(self) -> RolloutEvaluation | None:
        if self.held_out is None:
            return None
        options, gen = self.config.eval, self.options.gen
        scored = self.rewards(self.held_out)
        ways = {"greedy": replace(gen, greedy=True), "sampled": gen}
        base = self.generate()
        assert base.sampling is not None
        variants = {}
        for variant in options.draws:
            sampling = replace(base.sampling, config=ways[variant], num_samples=1)
            answer = replace(base, name=f"{variant}_gen", sampling=sampling)
            parameters = replace(self.options, recompute_logprobs=False)
            measure, names = partial(measure_rollout, parameters=parameters), measured_names(parameters)
            inputs = ("loss_mask", "logprobs", "has_eos", "rewards")
            variants[variant] = (
                answer,
                *scored,
                HostCall(name="measures", fn=measure, inputs=inputs, outputs=(), metrics=names),
            )
        loader = Loader(
            self.held_out,
            batch_size=self.config.dataset.train_bs_n_seqs,
            num_epochs=1,
            seed=self.config.seed,
            shuffle=False,
            allow_partial=True,
        )
        return RolloutEvaluation(role="actor", variants=variants, loader=loader, best_metric=options.best_metric)


def build_without_critic(
    experiment: str,
    config: RLConfig,
    devices: Sequence[jax.Device],
    make_advantages: Callable[[Any], HostFn],
    *,
    has_baseline: bool = False,
) -> RunSpec:
    """Returns the run of an algorithm that judges answers without a value model; ValueError as for `Setup`."""
    roles = {"actor_gen": "actor", "rew_inf": "rew", "ref_inf": "ref", "actor_train": "actor"}
    setup = Setup(config, devices, roles, place_grpo)
    answers, advantages = setup.generate(has_baseline=has_baseline), setup.advantages(make_advantages(setup.options))
    calls = (answers, *setup.rewards(), *setup.references(), advantages, setup.train_actor())
    return setup.run_spec(experiment, calls)


def measured_names(parameters: PolicyParameters) -> tuple[str, ...]:
    """Returns the names of what `measure_rollout` reports: that of an answer of one token."""
    one = np.ones((1, 1))
    arrays = {key: one.astype(int) for key in ("segment_ids", "loss_mask", "has_eos")}
    return tuple(measure_rollout({**arrays, "rewards": one, "logprobs": -one}, {}, parameters=parameters).metrics)


def measure_rollout(arrays: Arrays, state: State, *, parameters: PolicyParameters) -> HostResult:
    """Returns a rollout's measures: reward, lengths, how answers end."""
    return HostResult(arrays={}, metrics=rollout_metrics(arrays, Responses.of(arrays), parameters))
