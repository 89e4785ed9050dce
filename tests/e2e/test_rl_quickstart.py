"""The quickstart's PPO command, word for word: eight devices laid out by rule, and answers of a fixed length."""

import re
from contextlib import redirect_stdout

import numpy as np
import pytest

from realjax.apps import quickstart
from realjax.record.metrics import read_metrics
from tests.given.checkpoints import edit_tensors, write_llama, write_reward_model
from tests.given.models import quick_compiles
from tests.given.texts import write_rows
from tests.options.test_rl import QUICKSTART_PPO

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
LAYOUTS = {
    "actor_gen": r"d4p2m1 on 0-7 +actor from its home",
    "rew_inf": r"d2p1m2\+sp on 0-3 +rew from host memory",
    "ref_inf": r"d2p1m4\+sp on 0-7 +ref from host memory",
    "critic_inf": r"d2p1m2\+sp on 4-7 +critic ",
    "actor_train": r"d2p1m2\+sp\+zero2 on 0-3 +actor at home",
    "critic_train": r"d2p1m2\+sp\+zero2 on 4-7 +critic at home",
}


def test_ppo_word_for_word(tmp_path, monkeypatch):
    language_model = write_llama(tmp_path / "sft", max_position_embeddings=512)
    reward_model = write_reward_model(tmp_path / "rw", max_position_embeddings=512)
    # Small, so that ten times a score is no more than what scores are clipped to.
    small = 0.02 * np.random.default_rng(3).standard_normal((1, 32)).astype(np.float32)
    edit_tensors(reward_model, lambda tensors: tensors | {"score.weight": small})
    given = {
        "actor.path": language_model,
        "ref.path": language_model,
        "critic.path": reward_model,
        "rew.path": reward_model,
        "dataset.path": write_rows(tmp_path / "prompts.jsonl", 128, seed=1),
    }
    words = [f"{key}={given.get(key, value)}" for key, _, value in (word.partition("=") for word in QUICKSTART_PPO)]
    monkeypatch.setenv("REALJAX_FILEROOT", str(tmp_path / "root"))
    with quick_compiles(), (tmp_path / "output").open("w") as file, redirect_stdout(file):
        assert quickstart.main(["ppo", *words]) == 0
    output = (tmp_path / "output").read_text()
    for call, layout in LAYOUTS.items():
        assert re.search(rf"^{call} +{layout}", output, re.MULTILINE), call
    assert "no answer can end by itself: each is given its score as if it had ended" in output
    (logs,) = (tmp_path / "root" / "logs").glob("*/quickstart-ppo/release")
    (record,) = read_metrics(logs / "metrics.jsonl")
    assert record["n_seqs"] == 128 and record["eos_share"] == 0 and record["min_response_len"] == 256
    assert record["kl"] == pytest.approx(0, abs=1e-5)
    # Four updates at a warm-up's rate, of which only the first meets the actor that answered.
    assert record["importance_weight"] == pytest.approx(1, abs=1e-3) and record["actor_clip_ratio"] < 0.01
    # The score counts although nothing ended: with a KL of 0 it is all that there is to a return.
    assert record["returns"] == pytest.approx(record["task_reward"], rel=1e-4, abs=1e-4)
    assert record["task_reward_std"] > 0.1
    for role in ("actor", "critic"):
        assert list((tmp_path / "root" / "checkpoints").glob(f"*/quickstart-ppo/release/{role}/epoch1epochstep1glob*"))
