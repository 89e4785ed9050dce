"""What one option leaves without effect is refused or said, in every experiment."""

import itertools
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import pytest

from realjax.apps.quickstart import EXPERIMENTS
from realjax.options.checks import list_notices
from realjax.options.fields import Option, list_options
from realjax.options.parsing import parse_overrides
from realjax.options.void import VOID, spell_path, value_at, walk_nested

PLAIN = {name: experiment.config_cls() for name, experiment in EXPERIMENTS.items()}
RULES = [
    pytest.param(name, prefix, rule, id=f"{name} {prefix}{rule.options[0]}")
    for name, config in PLAIN.items()
    for prefix, node, _ in walk_nested(config, config, "")
    for cls, rules in VOID.items()
    if isinstance(node, cls)
    for rule in rules
]


def other_words(option: Option) -> Iterator[str]:
    """Yields values unlike an option's default, as one would write them; some may be out of its range."""
    kind = next((arg for arg in get_args(option.annotation) if arg is not type(None)), option.annotation)
    if get_origin(option.annotation) is Literal:
        yield from (word for word in get_args(option.annotation) if word != option.default)
    elif get_origin(kind) is Literal:
        yield from (word for word in get_args(kind) if word != option.default)
    elif kind is bool:
        yield str(not option.default)
    elif kind in (int, float):
        yield from (str(kind(x)) for x in (1.5, 2, 0.5, 3, 0.1) if kind(x) != option.default)
    else:
        yield "text"


def as_words(config: Any, prefix: str, when: dict[str, Any]) -> list[list[str]]:
    """Returns the ways to fulfil a rule's condition; what is no option holds by default."""
    node = value_at(config, prefix.rstrip("."))
    paths = {one.path for one in list_options(type(config))}
    ways = []
    for path, wanted in when.items():
        name = prefix + spell_path(node, path)
        values = wanted if isinstance(wanted, tuple) else (wanted,)
        if name in paths:
            ways.append([f"{name}={'null' if value is None else value}" for value in values])
    return [list(way) for way in itertools.product(*ways)]


@pytest.mark.parametrize(("name", "prefix", "rule"), RULES)
def test_every_rule_of_the_table_is_said_or_refused_for_every_option_of_it(name, prefix, rule):
    config = PLAIN[name]
    node = value_at(config, prefix.rstrip("."))
    options = {one.path: one for one in list_options(type(config))}
    for path in rule.options:
        full = prefix + spell_path(node, path)
        leaves = [one for one in options if one == full or one.startswith(f"{full}.")]
        assert leaves, f"{full} is no option"
        for leaf, way in itertools.product(leaves, as_words(config, prefix, rule.when)):
            if leaf in (word.partition("=")[0] for word in way):
                continue  # a group whose own option is the condition, as rew and rew.path
            assert any(is_said(type(config), way, leaf, word) for word in other_words(options[leaf])), (way, leaf)


def is_said(config_cls: type, way: list[str], leaf: str, word: str) -> bool:
    """Returns whether the option is named as without effect, or refused for a reason other than its range."""
    try:
        config = parse_overrides(config_cls, [*way, f"{leaf}={word}"])
    except ValueError as error:
        return "must be" not in str(error) or "with" in str(error)
    assert "".join(list_notices(parse_overrides(config_cls, way))).count(f"{leaf} ") == 0
    return any(leaf in line and "no effect" in line for line in list_notices(config))


SAID = [
    ("sft", "model.optimizer.lr_scheduler_type=constant", "model.optimizer.min_lr_ratio=0.1"),
    ("sft", "allocation_mode=manual", "allocation.parallel.use_sequence_parallel=True"),
    ("sft", "seed=1", "dataset.valid_path=rows.jsonl"),
    ("rw", "seed=1", "model.loss_chunk_tokens=8"),
    ("dpo", "reference_free=True", "ref.path=somewhere"),
    ("dpo", "seed=1", "ref.optimizer.lr=0.1"),
    ("gen", "gen.greedy=True", "gen.top_k=5"),
    ("gen", "gen.temperature=0", "gen.top_p=0.5"),
    ("gen", "seed=1", "dataset.pad_to_max_length=True"),
    ("gen", "seed=1", "allocation.n_mbs=2"),
    ("ppo", "ppo.kl_ctl=0", "ppo.kl_estimator=k3"),
    ("ppo", "ppo.kl_ctl=0", "ref.path=somewhere"),
    ("ppo", "ppo.kl_ctl=0.1", "ppo.adaptive_kl_target=3"),
    ("ppo", "ppo.gen.greedy=True", "ppo.gen.temperature=0.5"),
    ("ppo", "ppo.value_norm=False", "ppo.value_norm_beta=0.9"),
    ("ppo", "ppo.value_norm_type=ma", "ppo.value_norm_eps=0.1"),
    ("ppo", "ppo.loss_aggregation=sequence", "ppo.max_response_len=9"),
    ("ppo", "ppo.ppo_n_minibatches=1", "ppo.shuffle_minibatches=False"),
    ("ppo", "reward.fn=null", "reward.fn_weight=2"),
    ("ppo", "reward.fn=null", "reward.retries=2"),
    ("ppo", "rew.path=", "ppo.reward_output_scaling=10"),
    ("ppo", "seed=1", "eval.best_metric=greedy/task_reward"),
    ("ppo", "seed=1", "actor_gen.n_mbs=2"),
    ("ppo", "ppo.surrogate=cispo", "ppo.dual_clip=3"),
    ("ppo", "ppo.recompute_logprobs=True", "ppo.correction.level=sequence"),
    ("ppo", "eval.sampled=False", "eval.num_samples=4"),
    ("ppo", "eval.num_samples=1", "eval.success_above=0.9"),
    ("simpo", "seed=1", "dataset.valid_path=rows.jsonl"),
    ("grpo", "ppo.overlong_penalty=0", "ppo.overlong_buffer_len=4"),
    ("grpo", "ppo.kl_estimator=k1", "ppo.kl_in=loss"),
    ("grpo", "ppo.gen.min_new_tokens=256", "ppo.missing_eos_penalty=1"),
    ("rloo", "rew.path=", "rloo.reward_output_bias=1"),
    ("remax", "remax.surrogate=reinforce", "remax.eps_clip=0.1"),
]


@pytest.mark.parametrize(("name", "while_", "given"), SAID)
def test_an_option_without_effect_is_said_where_it_is_given(name, while_, given):
    config_cls, path = EXPERIMENTS[name].config_cls, given.partition("=")[0].rsplit(".", 1)[-1]
    said = lambda *words: [
        line for line in list_notices(parse_overrides(config_cls, words)) if path in line and "no effect" in line
    ]
    assert said(while_, given)
    # In GRPO the KL is in the loss unless it is said otherwise.
    assert not said(while_) or "k1" in while_


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("dpo", ["loss_type=ipo", "label_smoothing=0.1"], "^label_smoothing: found 0.1 with loss_type=ipo"),
        ("ppo", ["ppo.use_adaptive_kl_ctl=True", "ppo.kl_ctl=0"], "^ppo.use_adaptive_kl_ctl: found True; .* kl_ctl=0"),
        ("ppo", ["ppo.use_adaptive_kl_ctl=True", "ppo.kl_in=loss"], "^ppo.use_adaptive_kl_ctl: found True; .* kl_in"),
        ("ppo", ["ppo.ref_ema_eta=0.1", "ppo.kl_ctl=0"], "^ppo.ref_ema_eta: found 0.1 with kl_ctl=0"),
        ("grpo", ["ppo.mask_truncated=True", "ppo.gen.min_new_tokens=256"], "^ppo.mask_truncated: found True with gen"),
        ("gen", ["n=2", "gen.greedy=True"], "^num_samples: found 2 with greedy=True"),
    ],
)
def test_what_would_leave_nothing_of_what_was_asked_for_is_refused(name, words, message):
    with pytest.raises(ValueError, match=message):
        parse_overrides(EXPERIMENTS[name].config_cls, words)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_defaults_say_nothing(name):
    assert not [line for line in list_notices(PLAIN[name]) if "effect" in line]
