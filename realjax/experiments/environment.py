"""What a run needs of an environment: its conversations, the reward that they bring, and what is measured of them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from realjax.algorithms.responses import Responses
from realjax.core.host_call import Arrays, HostResult, State
from realjax.core.json_text import JsonObject
from realjax.core.metrics import Most, Total, measure_mean
from realjax.core.segments import segment_mask
from realjax.data.turns import TurnTemplate
from realjax.dataflow.graph import Host
from realjax.dataflow.turns import TURN_KEYS, Turns
from realjax.environments.environment import load_environment, read_messages
from realjax.environments.tools import find_format
from realjax.options.environment import EnvironmentOptions
from realjax.rewards.mix import RewardSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MEASURED = ("turns", "max_turns", "cut_off", "retries", "environment_failed")


def make_turns(
    options: EnvironmentOptions,
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[JsonObject],
    max_new_tokens: int,
    max_failed_share: float,
) -> Turns | None:
    """Returns how a run's rows are continued in turns; None without an environment.

    The first row's conversation is begun, to see that it can be. Raises ValueError where it cannot, and for a tokenizer
    without a chat template.
    """
    if options.path is None:
        return None
    if not tokenizer.chat_template:
        raise ValueError(
            f"env.path: the tokenizer {tokenizer.name_or_path!r} has no chat template, in which conversations are "
            "written; use the checkpoint of a chat model"
        )
    environment_cls = load_environment(options.path)
    template = TurnTemplate(tokenizer=tokenizer, tools=getattr(environment_cls, "tools", ()))
    turns = Turns(
        make_fn=environment_cls,
        rows=rows,
        template=template,
        tool_format=find_format(template.render),
        max_turns=options.max_turns,
        max_tokens=options.max_seqlen,
        step_seconds=options.step_seconds,
        num_threads=options.num_threads,
        max_retries=options.max_retries,
        max_failed_share=max_failed_share,
    )
    _try_first(turns, options, max_new_tokens)
    return turns


def _try_first(turns: Turns, options: EnvironmentOptions, max_new_tokens: int) -> None:
    subject = f"env.path {options.path}: reset of the first row"
    try:
        messages = turns.make(0).reset(dict(turns.rows[0]))
    except (Exception, SystemExit) as error:
        raise ValueError(f"{subject} raised {type(error).__name__}: {error}; mend the row, or the class") from error
    num_tokens = len(turns.template.open(read_messages(messages, f"{subject}: what it returned"), 0))
    if num_tokens + max_new_tokens > options.max_seqlen:
        raise ValueError(
            f"env.max_seqlen: found {options.max_seqlen}, but the first row begins with {num_tokens} tokens, and an "
            f"answer has up to {max_new_tokens}; raise it to {num_tokens + max_new_tokens} at least"
        )


def reward_source() -> RewardSource:
    """Returns the rewards of conversations: sums over their turns."""
    inputs = ("turn_rewards", "loss_mask", "has_eos", "env_failed")
    return RewardSource(name="environment", fn=_sum_turns, inputs=inputs, title="env.path")


def _sum_turns(arrays: Arrays, state: State) -> HostResult:
    responses = Responses.of({key: arrays[key] for key in ("segment_ids", "loss_mask", "has_eos")})
    return HostResult(arrays={"rewards": responses.sum(arrays["turn_rewards"]).astype(np.float32)})


def measure_turns() -> Host:
    """Returns the call that measures conversations: answers in them, and how they end."""
    inputs = (*TURN_KEYS, "has_eos")
    return Host(name="conversations", fn=_measure, inputs=inputs, outputs=(), metrics=MEASURED)


def _measure(arrays: Arrays, state: State) -> HostResult:
    exists = segment_mask(arrays["segment_ids"], arrays["has_eos"].shape[1])
    has_failed = exists & arrays["env_failed"].astype(bool)
    is_whole = exists & ~has_failed
    total = lambda values: Total(float(np.sum(values)))
    metrics = {
        "turns": measure_mean(arrays["num_turns"].astype(np.float64), is_whole),
        "max_turns": Most(float(arrays["num_turns"][is_whole].max(initial=0))),
        "cut_off": total(is_whole & ~arrays["has_eos"].astype(bool)),
        "retries": total(np.where(exists, arrays["num_retries"], 0)),
        "environment_failed": total(has_failed),
    }
    return HostResult(arrays={}, metrics=metrics)
