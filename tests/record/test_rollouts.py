"""Answers of training for a person: the few that are shown, and all of them in files."""

import gzip
import json

import numpy as np
import pytest

from realjax.data.packing import pack, pack_rows
from realjax.dataflow.run import RolloutRecord
from realjax.record.rollouts import RolloutWriter, describe_answers, rollout_sections

PROMPT, ANSWER = [1, 2], [7, 8, 9]
REWARDS = (0.5, 2.0, -1.0, 1.0)


def decode(prompts, answers):
    return [f"p{tokens}" for tokens in prompts], [f"a{tokens}" for tokens in answers]


@pytest.fixture
def rollout():
    """Answers to four prompts, the later ones one token shorter each, with rewards of two sources."""
    examples = []
    for i, reward in enumerate(REWARDS):
        answer = ANSWER[: 1 + (i % 3)]
        mask = np.array([False] * len(PROMPT) + [True] * len(answer))
        logprobs = np.where(mask, -1.0, 0).astype(np.float32)
        examples.append(
            {
                "tokens": np.array([*PROMPT, *answer], np.int32),
                "loss_mask": mask,
                "logprobs": logprobs,
                "ref_logprobs": 1.5 * logprobs,
                "advantages": np.where(mask, 2.0 * reward, 0).astype(np.float32),
                "rewards": np.float32(reward),
                "reward_terms": np.array([reward, 10 * reward], np.float32),
                "has_eos": np.array(i != 1),
                "prompt_id": np.array(10 - i, np.int32),
                "sample_id": np.array(0, np.int32),
            }
        )
    return pack(examples, pack_rows([len(one["tokens"]) for one in examples], 16))


def test_an_answer_has_its_texts_its_reward_with_terms_and_its_measures(rollout):
    found = describe_answers(rollout, decode, ("model", "fn"))
    assert [one["prompt_id"] for one in found] == [7, 8, 9, 10]
    second = found[2]  # of prompt 9: two tokens, cut off
    assert second == {
        "prompt_id": 9,
        "sample": 0,
        "reward": 2.0,
        "terms": {"model": 2.0, "fn": 20.0},
        "kl": pytest.approx(0.5),
        "advantage": pytest.approx(4.0),
        "tokens": 2,
        "ended": False,
        "prompt": "p[1, 2]",
        "answer": "a[7, 8]",
    }


def test_those_shown_go_from_the_lowest_reward_to_the_highest(rollout):
    shown = describe_answers(rollout, decode, ("model", "fn"), most=3)
    rewards = [one["reward"] for one in shown]
    assert (rewards[0], rewards[-1]) == (min(REWARDS), max(REWARDS)) and rewards == sorted(rewards)


def test_some_are_logged_and_all_are_kept_and_later_steps_come_again(rollout, tmp_path):
    options = RolloutRecord(log_steps=3, num_logged=2, keeps_all=True, terms=("model", "fn"))
    writer = RolloutWriter(tmp_path, options, decode)
    texts = {step: writer.add(step, rollout) for step in range(1, 7)}
    assert [step for step, text in texts.items() if text] == [1, 3, 6]
    assert "reward 2 (model 2, fn 20), kl 0.5 nats/token, advantage 4, 2 tokens, cut off" in texts[3]
    files = sorted((tmp_path / "rollouts").glob("*.gz"))
    assert [file.name for file in files] == [f"step{step:06d}.jsonl.gz" for step in range(1, 7)]
    lines = [json.loads(line) for line in gzip.decompress(files[0].read_bytes()).splitlines()]
    assert [line["reward"] for line in lines] == list(reversed(REWARDS))
    before = files[3].read_bytes()
    again = RolloutWriter(tmp_path, options, decode, resume_step=3)
    assert sorted(again.shown) == [1, 3]
    again.add(4, rollout)
    assert files[3].read_bytes() == before  # the same answers make the same file
    (section,) = rollout_sections(again.shown)
    assert [row[0] for row in section.rows] == [1, 1, 3, 3]


def test_nothing_is_written_where_nothing_is_asked_for(rollout, tmp_path):
    writer = RolloutWriter(tmp_path, RolloutRecord(), decode)
    assert writer.add(1, rollout) is None and not list(tmp_path.iterdir()) and not rollout_sections(writer.shown)
