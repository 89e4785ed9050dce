"""What the algorithms share that learn from rewards of their own answers: prompts -> answers -> rewards -> update."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from realjax.algorithms.ages import AGE_INPUTS, measure_ages
from realjax.algorithms.attempts import list_sizes, measure_attempts
from realjax.algorithms.corrections import CORRECTION_INPUTS, CorrectionParameters, make_corrections
from realjax.algorithms.groups import Groups
from realjax.algorithms.policy import PolicyParameters, make_policy_loss
from realjax.algorithms.responses import Responses
from realjax.algorithms.returns import rollout_metrics
from realjax.core.draw import Draw
from realjax.core.host_call import Arrays, HostFn, HostResult, State
from realjax.core.loss import Loss
from realjax.core.segments import segment_mask
from realjax.core.texts import decode_answers
from realjax.data.loader import Loader
from realjax.data.mixture import Mixture
from realjax.data.prompts import PromptDataset, PromptForm, load_prompts
from realjax.data.turns import TurnTemplate
from realjax.dataflow.graph import Call, DataflowGraph, Generate, Host, Inference, Minibatches, Train, put_ahead
from realjax.dataflow.run import MovingAverage, RoleSpec, RolloutEvaluation, RunSpec
from realjax.dataflow.turns import TURN_KEYS
from realjax.experiments import common
from realjax.experiments.answers import record_rollouts
from realjax.experiments.environment import make_turns, measure_turns
from realjax.experiments.rewards import TEXT_REWARDS, Judges
from realjax.hf.files import resolve_model_path
from realjax.hf.fingerprint import fingerprint_model
from realjax.hf.generation import load_eos_ids
from realjax.options.fields import find_instances
from realjax.options.lora import MergedAdapter, RLAdapterOptions
from realjax.options.model import ModelTrainEvalConfig
from realjax.options.parallel import MFCConfig
from realjax.options.rl import RLConfig
from realjax.rewards.functions import load_function
from realjax.rewards.mix import FAILED, REWARD_OUTPUTS
from realjax.rewards.text import call_votes, read_rollout

logger = logging.getLogger("realjax.rl")
ROLLOUT_KEYS = ("tokens", "loss_mask", "logprobs", "has_eos", "prompt_id", "group", "sample_id")

TRAINED = ("actor", "critic")
Prompts = PromptDataset | Mixture


class Setup:
    """An RL experiment's models and data, checked; and the calls that all of them make."""

    def __init__(self, config: RLConfig) -> None:
        """Raises ValueError for data or models that cannot work; nothing is allocated."""
        self.config, self.options = config, config.algorithm.resolved(config.staleness)
        models = find_instances(config, ModelTrainEvalConfig)
        self.roles = {name: self._role(name, model) for name, model in models.items() if name not in config.unused}
        self.tokenizer = common.load_tokenizer(self.roles["actor"].path)
        self.judges = Judges(config, self.tokenizer)
        self.prompts, self.held_out = self._load_prompts()
        longest = max(one.longest for one in (self.prompts, *self.held_out.values()))
        self.longest = config.env.max_seqlen if config.env.path else longest + self.options.gen.max_new_tokens
        self.eos_ids = load_eos_ids(self.roles["actor"].path, self.tokenizer)
        self.num_tokens = common.num_common_tokens(self.roles.values())
        self.draw = replace(self._draw(), num_tokens=self.num_tokens)
        self._check_replay()

    def _draw(self) -> Draw:
        """Returns what tokens are drawn from; says where that is not what ratios will be of."""
        gen, num_eos = self.options.gen, len(self.eos_ids)
        draw, recorded = (
            Draw.of(config, self.num_tokens, num_eos) for config in (gen, replace(gen, force_no_logits_mask=False))
        )
        if draw != recorded and not self.options.recomputes:
            logger.warning(
                "gen.force_no_logits_mask: which tokens top_k, top_p and min_new_tokens left is not recorded, so ratio "
                "and KL compare the distribution of the draw with one over all tokens, and start away from 1 and 0; "
                "leave it out, or set recompute_logprobs=True, which compares like with like"
            )
        return draw

    def _check_replay(self) -> None:
        """Raises ValueError where there are no experts whose choice could be replayed."""
        actor = self.roles["actor"]
        if self.options.routing_replay and actor.config.experts is None:
            raise ValueError(
                f"routing_replay: found True, but {actor.title} has no experts to send tokens to; leave it out"
            )

    def _routes(self, role: str) -> tuple[str, ...]:
        """Returns the key of the experts that tokens went to, where a role's call replays them."""
        return ("routes",) if role == "actor" and self.options.routing_replay else ()

    def _ages(self) -> tuple[str, ...]:
        """Returns the key of tokens' ages, where they have any."""
        return ("token_age",) if self.config.staleness else ()

    def _role(self, name: str, model: ModelTrainEvalConfig) -> RoleSpec:
        merged = self._merged(name, model)
        role = common.describe_role(name, model, is_trained=name in TRAINED, merged=merged)
        return replace(role, is_averaged=name == "ref" and self.options.ref_ema_eta is not None)

    def _merged(self, name: str, model: ModelTrainEvalConfig) -> MergedAdapter | None:
        """Returns the adapters that are merged into a role's weights."""
        if not isinstance(config := self.config, RLAdapterOptions):
            return None
        if name in ("actor", "ref"):
            return config.sft_adapter
        return config.rew_adapter if model.path == config.rew.path else None

    def _load_prompts(self) -> tuple[Prompts, dict[str, PromptDataset]]:
        data = self.config.dataset
        form = PromptForm(max_len=data.max_prompt_len, use_chat_template=data.use_chat_template, truncate=data.truncate)
        padded = replace(form, pad_to_max_length=data.pad_to_max_length)
        check_fn = self.judges.check_row if self.judges else None
        load = partial(load_prompts, tokenizer=self.tokenizer, check_fn=check_fn)
        train = common.load_data(self.config, data, "path", partial(load, form=padded))
        most = self.config.eval.num_prompts
        return train, common.load_held_out(
            self.config, data, lambda source: load(replace(source, max_rows=most), form=form)
        )

    def loader(self) -> Loader:
        """Returns the loader of prompts."""
        data, control = self.config.dataset, self.config.exp_ctrl
        loader = Loader(
            self.prompts, batch_size=data.train_bs_n_seqs, num_epochs=control.total_train_epochs, seed=self.config.seed
        )
        return loader.first_steps(control.max_steps)

    def generate(self, prompts: Prompts | None = None, *, has_baseline: bool = False) -> Generate:
        """Returns the call by which the actor answers a step's prompts, or others."""
        kept, baseline = ("kept",) if self.draw.kept else (), ("is_baseline",) if has_baseline else ()
        rows, most = (prompts or self.prompts).rows, self.options.gen.max_new_tokens
        turns = make_turns(self.config.env, self.tokenizer, rows, most, self._most_failed(prompts))
        return Generate(
            name="actor_gen",
            role="actor",
            inputs=("prompts",),
            outputs=(
                *ROLLOUT_KEYS,
                *(TURN_KEYS if turns else ()),
                *kept,
                *baseline,
                *self._ages(),
                *self._routes("actor"),
            ),
            config=self.options.gen,
            eos_ids=self.eos_ids,
            num_prompts=self.config.dataset.train_bs_n_seqs,
            num_samples=self.config.num_samples,
            has_baseline=has_baseline,
            **self.options.gen.slots(),
            num_tokens=self.num_tokens,
            records_routes=self.options.routing_replay,
            max_seqlen=self.longest,
            turns=turns,
        )

    def infer(self, call: str, role: str, key: str, head: str, *, options: str | None = None) -> Inference:
        """Returns an inference call whose head's output becomes `key`; `options` is the call whose options it has."""
        draw, mask = (self.draw, "loss_mask") if head == "logprobs" else (Draw(), None)
        return Inference(
            name=call,
            role=role,
            inputs=("tokens", *((mask,) if mask else ()), *(("kept",) if draw.kept else ()), *self._routes(role)),
            outputs=(key,),
            head=head,
            mask=mask,
            draw=draw,
            max_seqlen=self.longest,
            micro_batches=self._call_options(options or call).micro_batches,
            placed_as=options,
        )

    def _call_options(self, call: str) -> MFCConfig:
        return getattr(self.config, call)

    def references(self) -> tuple[Inference, ...]:
        """Returns the calls that compute log-probabilities anew: the reference's, and the actor's own if asked for."""
        ref = (self.infer("ref_inf", "ref", "ref_logprobs", "logprobs"),) if "ref" in self.roles else ()
        if not self.options.recomputes:
            return ref
        return (*ref, self.infer("actor_inf", "actor", "old_logprobs", "logprobs", options="actor_train"))

    def rewards(self, prompts: Prompts | None = None) -> tuple[Inference | Host, ...]:
        """Returns the calls that give every answer a reward; `prompts` are other ones than those of training."""
        has_model = "rew" in self.roles
        return self.judges.calls(
            (prompts or self.prompts).rows,
            self.infer("rew_inf", "rew", "scores", "values") if has_model else None,
            self.roles["rew"].title if has_model else "",
            max_failed_share=self._most_failed(prompts),
        )

    def _most_failed(self, prompts: Prompts | None) -> float:
        """Returns the share of a step's answers that may fail, to prompts of training or to others."""
        # Held-out prompts may be few: what fails of them is counted, and does not end the run.
        return self.config.reward.max_failed_share if prompts is None else 1.0

    def advantages(self, fn: HostFn) -> Host:
        """Returns the host call that turns rewards into advantages."""
        turns = ("turn_rewards",) if self.config.env.path else ()
        inputs, outputs = (*self.options.advantage_inputs, *turns), self.options.ADVANTAGE_OUTPUTS
        return Host(name="advantages", fn=fn, inputs=inputs, outputs=outputs)

    def corrections(self) -> tuple[Host, ...]:
        """Returns the host call that weighs tokens which another policy drew, if one is asked for."""
        correction = self.options.correction
        if not correction.is_on:
            return ()
        fn = make_corrections(correction)
        return (Host(name="corrections", fn=fn, inputs=CORRECTION_INPUTS, outputs=("correction",)),)

    def train(self, role: str, loss: Loss, inputs: tuple[str, ...]) -> Train:
        """Returns the training call of a role, in the minibatches that the options ask for."""
        kept, options, name = ("kept",) if loss.draw.kept else (), self.options, f"{role}_train"
        minibatches = Minibatches(
            count=options.ppo_n_minibatches, passes=options.ppo_epochs, shuffle=options.shuffle_minibatches
        )
        return Train(
            name=name,
            role=role,
            inputs=(*inputs, *kept, *self._routes(role)),
            loss=loss,
            mask="train_mask" if loss.head == "logprobs" else None,
            minibatches=minibatches,
            max_seqlen=self.longest,
            micro_batches=self._call_options(name).micro_batches,
        )

    def train_actor(self) -> Train:
        """Returns the actor's training call."""
        return self.train("actor", make_policy_loss(self.options, self.draw), self.options.actor_inputs)

    def run_spec(self, experiment: str, calls: Sequence[Call]) -> RunSpec:
        """Returns the run of these calls; with staleness, what no update changes is done ahead of training."""
        if self.config.staleness:
            frozen = {"ref_inf"} if self.options.ref_ema_eta is None else set()
            measure = Host(name="ages", fn=measure_ages, inputs=AGE_INPUTS, outputs=(), metrics=())
            ahead = {"actor_gen", TEXT_REWARDS, "rew_inf", "rewards", *frozen}
            calls = put_ahead((*calls, measure), ahead, self.config.staleness)
        calls = (*calls, *self._conversations())
        eta, evaluations = self.options.ref_ema_eta, self._evaluations()
        measured = (
            name for call in calls if isinstance(call, Host) and call.name == "rewards" for name in call.metrics
        )
        terms = tuple(name.removeprefix("reward/") for name in measured if name != FAILED)
        return common.run_spec(
            self.config,
            experiment=experiment,
            graph=DataflowGraph(tuple(calls), frozenset({"prompts"})),
            roles=self.roles,
            tokenizer=self.tokenizer,
            loader=self.loader(),
            evaluations=evaluations,
            best_metric=self.config.eval.best_metric if evaluations else None,
            averages=() if eta is None else (MovingAverage(role="ref", source="actor", eta=eta),),
            contents=self._contents(evaluations),
            rollouts=record_rollouts(self.config.rollouts, terms),
            decode_fn=partial(decode_answers, self.tokenizer, frames=self._frames()),
        )

    def _conversations(self) -> tuple[Host, ...]:
        """Returns the call that measures conversations, where there are any."""
        return (measure_turns(),) if self.config.env.path else ()

    def _frames(self) -> list[tuple[str, str]]:
        """Returns the template's words around what is said in conversations, which nobody needs to read."""
        return TurnTemplate(tokenizer=self.tokenizer).frames() if self.config.env.path else []

    def _contents(self, evaluations: Mapping[str, RolloutEvaluation]) -> dict[str, str]:
        """Returns digests of what decides about the run beside its models and prompts."""
        contents = {}
        if self.config.reward.classifier:
            contents["reward.classifier"] = fingerprint_model(resolve_model_path(self.config.reward.classifier))
        best = self.config.eval.best_metric
        for name, evaluation in evaluations.items():
            if best is not None and (not name or best.startswith(f"{name}/")):
                contents["set of held-out prompts"] = evaluation.loader.fingerprint
        return contents

    def _evaluations(self) -> dict[str, RolloutEvaluation]:
        return {name: self._evaluate(prompts) for name, prompts in self.held_out.items()}

    def _evaluate(self, prompts: PromptDataset) -> RolloutEvaluation:
        """Returns the measure of answers to held-out prompts."""
        options, gen = self.config.eval, self.options.gen
        scored = self.rewards(prompts)
        ways = {"greedy": (replace(gen, greedy=True), 1), "sampled": (gen, options.num_samples)}
        # Alike for all sets: what is compiled for one serves the others.
        num_prompts = min(self.config.dataset.train_bs_n_seqs, max(map(len, self.held_out.values())))
        base = replace(self.generate(prompts), placed_as="actor_gen", num_prompts=num_prompts)
        parameters = replace(self.options, recompute_logprobs=False, correction=CorrectionParameters())
        measure, names = partial(measure_rollout, parameters=parameters), measured_names(parameters)
        inputs = ("loss_mask", "logprobs", "has_eos", *REWARD_OUTPUTS)
        measures = Host(name="measures", fn=measure, inputs=inputs, outputs=(), metrics=names)
        variants = {}
        for variant in options.draws:
            way, num_samples = ways[variant]
            answer = replace(base, name=f"{variant}_gen", config=way, num_samples=num_samples)
            attempts = (self._attempts(prompts),) if num_samples > 1 else ()
            variants[variant] = (answer, *scored, measures, *attempts, *self._conversations())
        batch_size, seed = self.config.dataset.train_bs_n_seqs, self.config.seed
        loader = Loader(prompts, batch_size=batch_size, seed=seed, in_order=True)
        return RolloutEvaluation(role="actor", variants=variants, loader=loader)

    def _attempts(self, prompts: Prompts) -> Host:
        """Returns the call that measures several answers to a prompt as attempts to solve it."""
        options, name = self.config.eval, "eval.vote_fn"
        vote_fn = load_function(options.vote_fn, name) if options.vote_fn else None

        def measure(arrays: Arrays, state: State) -> HostResult:
            is_failed = arrays["is_failed"].astype(bool)
            exists = segment_mask(arrays["segment_ids"], is_failed.shape[1])
            groups, votes = Groups.of(arrays["group"], exists & ~is_failed), None
            if vote_fn is not None:
                places, asked, answers, rows = read_rollout(arrays, self.tokenizer, prompts.rows)
                every = call_votes(vote_fn, f"{name} {options.vote_fn}", asked, answers, rows)
                votes = [vote for place, vote in zip(places, every, strict=True) if not is_failed[place]]
            solved = arrays["rewards"] > options.success_above
            return HostResult(arrays={}, metrics=measure_attempts(solved, groups, options.num_samples, votes))

        majority = (f"majority@{options.num_samples}",) if vote_fn else ()
        names = (*(f"pass@{k}" for k in list_sizes(options.num_samples)), *majority)
        inputs = ("loss_mask", "prompt_id", "group", *REWARD_OUTPUTS)
        return Host(name="attempts", fn=measure, inputs=inputs, outputs=(), metrics=names)


def build_without_critic(
    experiment: str,
    config: RLConfig,
    make_advantages: Callable[..., HostFn],
    *,
    has_baseline: bool = False,
) -> RunSpec:
    """Returns the run of an algorithm that judges answers without a value model; ValueError as for `Setup`."""
    setup = Setup(config)
    answers, advantages = setup.generate(has_baseline=has_baseline), setup.advantages(make_advantages(setup.options))
    judged = (answers, *setup.rewards(), *setup.references(), advantages)
    return setup.run_spec(experiment, (*judged, *setup.corrections(), setup.train_actor()))


def measured_names(parameters: PolicyParameters) -> tuple[str, ...]:
    """Returns the names of what `measure_rollout` reports: that of an answer of one token."""
    one = np.ones((1, 1))
    arrays = {key: one.astype(int) for key in ("segment_ids", "loss_mask", "has_eos")}
    return tuple(measure_rollout({**arrays, "rewards": one, "logprobs": -one}, {}, parameters=parameters).metrics)


def measure_rollout(arrays: Arrays, state: State, *, parameters: PolicyParameters) -> HostResult:
    """Returns a rollout's measures: reward, lengths, how answers end."""
    return HostResult(arrays={}, metrics=rollout_metrics(arrays, Responses.of(arrays), parameters))
