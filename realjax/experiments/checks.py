"""What has to hold of every run, whatever its experiment: models fit their roles, their tokens and their sequences."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from realjax.core.batch import find_dims
from realjax.dataflow.graph import Generate, Host
from realjax.dataflow.run import Evaluation, RoleSpec, RolloutEvaluation, RunSpec, join_names
from realjax.experiments.common import load_tokenizer, name_option
from realjax.hf.load import check_weights, count_params, has_critic_head
from realjax.options.parsing import nearest_names

logger = logging.getLogger("realjax.checks")
MOST_PARAMS = 2**42  # whose float32 numbers no cluster of today holds
MOST_UPDATES = 2**31 - 1
TOKENIZER_FILES = ("tokenizer*", "vocab.*", "merges.txt", "spiece.model")


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a run asks of its models. The first role's tokenizer made the tokens."""

    roles: tuple[RoleSpec, ...]
    longest: Mapping[str, int]  # tokens of the longest sequence that each role meets
    eos_ids: frozenset[int]  # tokens that end the answers drawn
    generates: bool
    converses: bool  # with an environment


def check_run(spec: RunSpec) -> None:
    """Raises ValueError for a model that does not fit the run's tokens or its longest sequence, or whose files are not
    whole; for a key whose dims have no names; and for updates, averages and metrics that cannot be.

    Reads tokenizers and the heads of weight files; nothing is put on a device.
    """
    for key in spec.graph.producers:
        find_dims(key)  # raises for one without a line in the table
    need = _find_need(spec)
    for role in need.roles:
        _check_weights(role)
    _check_tokens(need)
    for role in need.roles:
        _check_positions(role, need)
    _check_updates(spec)
    _check_averages(spec)
    if spec.best_metric is not None:
        _check_best_metric(spec.best_metric, spec.evaluations)


def _find_need(spec: RunSpec) -> Need:
    longest: dict[str, int] = {}
    for call in spec.mfcs:
        assert call.max_seqlen, f"{call.name}: a call says how long the sequences are that it can meet"
        longest[call.role] = max(call.max_seqlen, longest.get(call.role, 0))
    for evaluation in spec.evaluations.values():
        if isinstance(evaluation, Evaluation):
            longest[evaluation.role] = max(evaluation.loader.longest, longest[evaluation.role])
    drawn = [call for call in spec.mfcs if isinstance(call, Generate)]
    eos_ids = frozenset(token for call in drawn for token in call.eos_ids)
    return Need(
        roles=tuple(spec.roles.values()),
        longest=longest,
        eos_ids=eos_ids,
        generates=bool(drawn),
        converses=any(call.turns is not None for call in drawn),
    )


def _check_weights(role: RoleSpec) -> None:
    if not role.init_from_scratch:
        has_head = not role.config.is_critic or (not role.init_critic_from_actor and has_critic_head(role.path))
        check_weights(role.path, role.config.without_adapters(), has_new_head=not has_head)
    elif (num_params := count_params(role.config)) > MOST_PARAMS:
        raise ValueError(
            f"{name_option(role.name)}.path: '{role.path}' describes a model of {num_params} parameters, more than "
            f"{MOST_PARAMS}; correct the sizes in its config.json"
        )


def _check_tokens(need: Need) -> None:
    """Raises ValueError for a model that reads other tokens than the data's, or has no row for one of them."""
    first, *others = need.roles
    tokens: dict[str, int] = load_tokenizer(first.path).get_vocab()
    for role in others:
        _check_same_tokens(role, first, tokens)
    num_ids = 1 + max(tokens.values())
    for role in need.roles:
        option, num_rows = name_option(role.name), role.config.vocab_size
        if num_rows < num_ids:
            without = sorted(tokens, key=lambda token: tokens[token])[-1]
            raise ValueError(
                f"{option}.path: the model has {num_rows} tokens, but the tokenizer of '{first.path}' has ids up to "
                f"{num_ids - 1} ({without!r}); use a checkpoint that was made with this tokenizer, or remove the "
                "tokens that were added to it"
            )
        if beyond := [token for token in need.eos_ids if token >= num_rows]:
            raise ValueError(
                f"{option}.path: the model has {num_rows} tokens, but {min(beyond)} is to end answers; correct "
                f"eos_token_id in generation_config.json or config.json of '{first.path}'"
            )


def _check_same_tokens(role: RoleSpec, first: RoleSpec, tokens: Mapping[str, int]) -> None:
    option = name_option(role.name)
    if not _has_tokenizer(role.path):
        logger.info("%s.path has no tokenizer: its tokens are taken to be those of %s", option, first.path)
        return
    own: dict[str, int] = load_tokenizer(role.path).get_vocab()
    if differing := sum(own.get(token) != i for token, i in tokens.items()):
        remedy = "; as reward.classifier it would read the texts with its own" if role.name == "rew" else ""
        raise ValueError(
            f"{option}.path: its tokenizer is not that of '{first.path}' ({differing} tokens differ), so it would "
            f"misread the run's tokens; use a model of the same family{remedy}"
        )


def _has_tokenizer(path: Path) -> bool:
    return any(next(path.glob(pattern), None) for pattern in TOKENIZER_FILES)


def _check_positions(role: RoleSpec, need: Need) -> None:
    longest, positions = need.longest.get(role.name, 0), role.config.max_positions
    if longest <= positions:
        return
    if need.converses:
        raise ValueError(
            f"env.max_seqlen: found {longest}, but the model of {name_option(role.name)}.path has {positions} "
            f"positions; lower it to {positions}"
        )
    made = "prompt and gen.max_new_tokens make" if need.generates else "row has"
    options = "dataset.max_prompt_len or gen.max_new_tokens by" if need.generates else "dataset.max_seqlen to"
    raise ValueError(
        f"{name_option(role.name)}.path: the longest {made} {longest} tokens, but the model has {positions} positions; "
        f"lower {options} {longest - positions if need.generates else positions}"
    )


def _check_updates(spec: RunSpec) -> None:
    """Raises ValueError for more updates than are counted: the optimizer's counter has 32 bits."""
    for role in spec.graph.roles:
        if (num_updates := spec.loader.total_steps * spec.graph.num_updates(role)) > MOST_UPDATES:
            raise ValueError(
                f"total_train_epochs: {spec.loader.total_steps} steps make {num_updates} updates of {role}, but at "
                f"most {MOST_UPDATES} are counted; lower it, or the minibatches and passes of a step"
            )


def _check_averages(spec: RunSpec) -> None:
    for average in spec.averages:
        if spec.roles[average.source].config.lora is not None:
            raise ValueError(
                f"ref_ema_eta: {average.role} is to follow {average.source}, which has adapters, and is its weights "
                "without them; leave ref_ema_eta null, or train all parameters (lora.rank=0)"
            )
        configs = [replace(spec.roles[name].config, max_positions=1) for name in (average.role, average.source)]
        differing = [name for name in vars(configs[0]) if getattr(configs[0], name) != getattr(configs[1], name)]
        if differing:
            raise ValueError(
                f"{average.role}.path: it is to follow {average.source} (ref_ema_eta), but differs from it in "
                f"{', '.join(differing)}; give a model of the same sizes, or leave ref_ema_eta null"
            )


def _check_best_metric(name: str, evaluations: Mapping[str, Evaluation | RolloutEvaluation]) -> None:
    """Raises ValueError for a name that no evaluation will report."""
    known = [
        join_names(held_out, variant, metric)
        for held_out, evaluation in evaluations.items()
        if isinstance(evaluation, RolloutEvaluation)
        for variant, calls in evaluation.variants.items()
        for call in calls
        if isinstance(call, Host)
        for metric in call.metrics
    ]
    if name not in known:
        near = nearest_names(name, known, count=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"eval.best_metric: no evaluation reports {name!r}; {hint}")
