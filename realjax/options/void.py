"""Options that others leave without effect: one table for all experiments, read where a run begins."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

from realjax.algorithms.corrections import CorrectionParameters
from realjax.algorithms.distill import DistillParameters
from realjax.algorithms.grpo import GRPOParameters
from realjax.algorithms.policy import PolicyParameters
from realjax.algorithms.ppo import PPOParameters
from realjax.algorithms.reinforce_pp import ReinforcePPParameters
from realjax.algorithms.remax import ReMaxParameters
from realjax.algorithms.rloo import RLOOParameters
from realjax.core.generation_config import GenerationConfig
from realjax.core.optimizer_config import OptimizerConfig
from realjax.core.option import DataclassInstance
from realjax.options.common import CommonExperimentConfig
from realjax.options.distill import DistillConfig
from realjax.options.environment import EnvironmentOptions
from realjax.options.evaluation import EvaluationOptions, RolloutOptions, SampleOptions
from realjax.options.generation import GenConfig
from realjax.options.lora import LoRAOptions
from realjax.options.parallel import ParallelismConfig
from realjax.options.rewards import RewardOptions
from realjax.options.rl import GRPOHyperparameters, PPOConfig, RLConfig, StepOptions
from realjax.options.supervised import AnsweringConfig, DPOConfig, KTOConfig, PairsConfig, RWConfig, SFTConfig
from realjax.rewards.scoring import ScoringParameters


@dataclass(frozen=True, kw_only=True)
class Void:
    """`options` do nothing while those in `when` have these values, one of them where it is a tuple.

    Paths start at the class of the table's key; a group stands for all of its options, `algorithm` for the algorithm's.
    """

    options: tuple[str, ...]
    when: Mapping[str, object] = field(default_factory=dict)  # nothing: always
    reason: str | None = None  # in place of the condition's words


def _without_training(role: str) -> Void:
    moments = (one.name for one in dataclasses.fields(OptimizerConfig) if one.name not in ("type", "offload"))
    options = (*(f"optimizer.{name}" for name in moments), "zero_stage", "gradient_checkpointing")
    return Void(options=tuple(f"{role}.{option}" for option in options), reason=f"{role} is never trained")


def _without_vocabulary(role: str) -> Void:
    return Void(options=(f"{role}.loss_chunk_tokens",), reason=f"{role} has a scalar head and makes no logits")


def _without_answers(*roles: str) -> Void:
    return Void(options=tuple(f"{role}.lora.merge" for role in roles), reason="no answers are drawn from it")


def _of_heuristic(*roles: str) -> Void:
    sizes = tuple(f"{role}.type.size" for role in roles)
    return Void(when={"places_by_size": False}, options=sizes, reason="only allocation_mode=heuristic goes by sizes")


def _without_evaluation(*options: str, **when: object) -> Void:
    reason = "nothing is evaluated without eval_freq_epochs, eval_freq_steps or eval_freq_secs"
    return Void(when={"exp_ctrl.evaluates": False, **when}, options=options, reason=reason)


def _of_generation(call: str) -> Void:
    options = ("n_mbs", "max_tokens_per_mb", "parallel.use_sequence_parallel")
    reason = "answers are decoded in slots (gen.num_slots), token by token"
    return Void(options=tuple(f"{call}.{option}" for option in options), reason=reason)


_WITHOUT_TRAINING = (
    *("total_train_epochs", "lr_schedule_epochs", "max_steps"),
    *(f"{what}_freq_{unit}" for what in ("save", "eval") for unit in ("epochs", "steps", "secs")),
)
_SLOTS = ("num_slots", "tail_slots", "tail_model_parallel_size")
_DRAWN = ("temperature", "top_p", "top_k")
_MOMENTS = ("value_norm_beta", "value_norm_eps")
_LENGTH = Void(when={"loss_aggregation": ("token", "sequence")}, options=("max_response_len",))

VOID: dict[type, tuple[Void, ...]] = {
    CommonExperimentConfig: (
        Void(
            when={"is_planned": False},
            options=("allocation_use_cache", *(f"planner.{name}" for name in ("evaluations", "seed", "replan"))),
            reason="only allocation_mode=search looks for a plan",
        ),
        Void(
            when={"recover_mode": ("disabled", "save", "resume")},
            options=("recover_retries",),
            reason="only a run with recover_mode=auto is started again",
        ),
    ),
    LoRAOptions: (Void(when={"is_on": False}, options=("alpha",), reason="without lora.rank there is no adapter"),),
    OptimizerConfig: (Void(when={"lr_scheduler_type": "constant"}, options=("min_lr_ratio",)),),
    ParallelismConfig: (Void(when={"model_parallel_size": 1}, options=("use_sequence_parallel",)),),
    GenerationConfig: (
        Void(when={"greedy": True}, options=_DRAWN),
        Void(when={"greedy": True, "min_new_tokens": 0}, options=("force_no_logits_mask",)),
        Void(when={"prompt_lookup_num_tokens": (None, 0)}, options=("max_matching_ngram_size",)),
    ),
    PolicyParameters: (
        Void(when={"kl_ctl": 0.0}, options=("kl_in", "kl_estimator")),
        Void(when={"use_adaptive_kl_ctl": False}, options=("adaptive_kl_target", "adaptive_kl_horizon")),
        Void(when={"surrogate": "reinforce"}, options=("eps_clip", "eps_clip_high")),
        Void(when={"surrogate": ("reinforce", "cispo")}, options=("dual_clip",)),
    ),
    CorrectionParameters: (
        Void(when={"kind": "none"}, options=("level", "low", "high")),
        Void(when={"kind": ("auto", "tis")}, options=("low",)),
    ),
    PPOParameters: (
        _LENGTH,
        Void(when={"value_norm": False}, options=("value_norm_type", *_MOMENTS)),
        Void(when={"value_norm_type": "ma"}, options=_MOMENTS),
    ),
    GRPOParameters: (
        Void(when={**_LENGTH.when, "overlong_penalty": 0.0}, options=_LENGTH.options),
        Void(when={"overlong_penalty": 0.0}, options=("overlong_buffer_len",)),
    ),
    GRPOHyperparameters: (Void(when={"max_draws": 1}, options=("if_uniform",)),),
    RLOOParameters: (_LENGTH,),
    ReMaxParameters: (_LENGTH,),
    ReinforcePPParameters: (_LENGTH,),
    StepOptions: (Void(when={"ppo_n_minibatches": 1}, options=("shuffle_minibatches",)),),
    RewardOptions: (
        Void(when={"fn": None}, options=("fn_weight", *(one.name for one in dataclasses.fields(ScoringParameters)))),
        Void(when={"classifier": None}, options=("classifier_weight", "classifier_label")),
    ),
    EnvironmentOptions: (
        Void(
            when={"path": None},
            options=("max_turns", "max_seqlen", "step_seconds", "max_retries", "num_threads"),
            reason="without env.path a prompt is answered once",
        ),
    ),
    EvaluationOptions: (
        Void(when={"sampled": False}, options=("num_samples", "success_above", "vote_fn")),
        Void(when={"num_samples": 1}, options=("success_above", "vote_fn")),
    ),
    RLConfig: (
        Void(when={"algorithm.kl_ctl": 0.0}, options=("ref", "ref_inf"), reason="with kl_ctl=0 no reference is loaded"),
        Void(
            when={"rew.path": ""},
            options=(
                *("rew", "rew_inf", "reward.model_weight"),
                *("algorithm.reward_output_scaling", "algorithm.reward_output_bias"),
            ),
            reason="without rew.path no reward model is loaded",
        ),
        Void(
            when={"staleness": 0, "algorithm.correction.kind": "auto"},
            options=("algorithm.correction.level", "algorithm.correction.high"),
        ),
        _of_heuristic("actor", "ref", "rew"),
        _without_training("ref"),
        _without_training("rew"),
        _without_vocabulary("rew"),
        _without_answers("ref", "rew"),
        _of_generation("actor_gen"),
        _without_evaluation("dataset.valid_path", "eval"),
    ),
    AnsweringConfig: (_without_evaluation("dataset.valid_path", held_out_use=None),),
    SampleOptions: (Void(when={"num_prompts": 0}, options=("max_new_tokens",)),),
    RolloutOptions: (Void(when={"log_freq_steps": None}, options=("num_logged",)),),
    PPOConfig: (_without_vocabulary("critic"), _without_answers("critic"), _of_heuristic("critic")),
    SFTConfig: (
        _of_heuristic("model"),
        _without_evaluation("dataset.valid_bs_n_seqs"),
    ),
    RWConfig: (
        _of_heuristic("model"),
        _without_answers("model"),
        _without_evaluation("dataset.valid_path", "dataset.valid_bs_n_seqs"),
        _without_vocabulary("model"),
    ),
    DPOConfig: (
        _of_heuristic("actor", "ref"),
        _without_answers("ref"),
        Void(when={"reference_free": True}, options=("ref", "ref_inf")),
        _without_training("ref"),
        _without_evaluation("dataset.valid_bs_n_seqs"),
    ),
    KTOConfig: (
        _of_heuristic("actor", "ref"),
        _without_answers("ref"),
        _without_training("ref"),
        _without_evaluation("dataset.valid_bs_n_seqs"),
    ),
    PairsConfig: (
        _of_heuristic("actor"),
        _without_evaluation("dataset.valid_bs_n_seqs"),
    ),
    DistillConfig: (
        _of_heuristic("actor", "teacher"),
        _without_answers("teacher"),
        _without_training("teacher"),
        _of_generation("actor_gen"),
        _without_evaluation("dataset.valid_path"),
        Void(
            options=("distill.gen.force_no_logits_mask",),
            reason="distributions are compared over all tokens, whatever was left to draw from",
        ),
        Void(
            when={"distill.data_share": 1.0},
            options=tuple(f"distill.gen.{name}" for name in ("min_new_tokens", "greedy", *_DRAWN, *_SLOTS)),
            reason="with data_share=1 no answer is drawn",
        ),
    ),
    DistillParameters: (Void(when={"divergence": ("forward_kl", "reverse_kl")}, options=("beta",)),),
    GenConfig: (
        _of_heuristic("model"),
        _without_training("model"),
        _of_generation("allocation"),
        Void(options=("model.loss_chunk_tokens", "gen.force_no_logits_mask"), reason="gen computes no loss"),
        Void(options=("dataset.pad_to_max_length",), reason="gen takes prompts as they are"),
        Void(
            options=(*(f"exp_ctrl.{name}" for name in _WITHOUT_TRAINING), "max_nonfinite_steps"),
            reason="gen answers each prompt once, and keeps each step's answers: it trains and evaluates nothing",
        ),
    ),
}


def list_void(config: CommonExperimentConfig) -> list[str]:
    """Returns a line for every rule of the table that leaves options of `config` without effect which are not at their
    defaults.
    """
    lines = []
    for prefix, node, default in walk_nested(config, type(config)(), ""):
        for rule in _find_rules(node):
            if all(_is_among(value_at(node, name), wanted) for name, wanted in rule.when.items()):
                given = [f"{prefix}{name}" for option in rule.options for name in _given(node, default, option)]
                words = " and ".join(f"{prefix}{name}={value_at(node, name)}" for name in rule.when)
                if given:
                    verb = "have" if len(given) > 1 else "has"
                    lines.append(f"{', '.join(given)} {verb} no effect: {rule.reason or f'with {words}'}.")
    return lines


def walk_nested(
    node: DataclassInstance, default: object, prefix: str
) -> Iterator[tuple[str, DataclassInstance, object]]:
    """Yields every dataclass of the tree with its path, and its counterpart among the defaults."""
    yield prefix, node, default
    for one in dataclasses.fields(node):
        value = getattr(node, one.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from walk_nested(value, getattr(default, one.name), f"{prefix}{one.name}.")


def _find_rules(node: object) -> list[Void]:
    return [rule for cls, rules in VOID.items() if isinstance(node, cls) for rule in rules]


def value_at(node: object, path: str) -> Any:
    """Returns what stands at a dotted path, a property among them; the node itself at the empty one."""
    return reduce(getattr, path.split(".") if path else (), node)


def _is_among(value: object, wanted: object) -> bool:
    return value in wanted if isinstance(wanted, tuple) else value == wanted


def _given(node: DataclassInstance, default: object, path: str) -> list[str]:
    """Returns the paths of the options at `path`, one or those of a group, that are not at their defaults."""
    value, usual = value_at(node, path), value_at(default, path)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return [spell_path(node, path)] if value != usual else []
    inner = (name for one in dataclasses.fields(value) for name in _given(value, usual, one.name))
    return [spell_path(node, f"{path}.{name}") for name in inner]


def spell_path(node: DataclassInstance, path: str) -> str:
    """Returns the path with the name of the algorithm's own group for `algorithm`."""
    first, _, rest = path.partition(".")
    if first != "algorithm":
        return path
    group = next(one.name for one in dataclasses.fields(node) if getattr(node, one.name) is value_at(node, "algorithm"))
    return f"{group}.{rest}"
