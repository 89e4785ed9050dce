"""Reinforcement learning of models that are not built like Llama: what samples, scores and learns is one model."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.given.checkpoints import write_family
from tests.given.commands import Trial, stopped_after
from tests.given.runs import LAYOUTS, Given

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick")]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0, "query_pre_attn_scalar": 24}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
CONFIGS = {
    "gemma2": {**SIZES, **CAPS, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "sliding_window": 5},
    "gpt2": {**SIZES, "n_inner": 48},
    "mistral": {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "sliding_window": 5},
    "qwen3_moe": {**SIZES, **EXPERTS, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48},
}


@pytest.mark.parametrize("family", CONFIGS)
def test_two_steps_of_ppo(family, given: Given, tmp_path):
    path = write_family(tmp_path / family, family, **CONFIGS[family])
    trial = Trial(given=given, root=tmp_path, experiment="ppo", options=LAYOUTS["data and tensor"])
    models = {f"{role}__path": path for role in ("actor", "critic", "ref", "rew")}
    options = {"algo__routing_replay": True, "actor__router_aux_loss_coef": 0.01} if "moe" in family else {}
    with stopped_after(2):
        assert trial.run(**models, save_freq_steps=2, algo__recompute_logprobs=True, **options) == 143
    records = trial.metrics("train")
    assert [record["step"] for record in records] == [1, 2]
    for record in records:
        assert record["sampler_error"] == pytest.approx(1, abs=1e-5)
        assert ("actor_train/balance_loss" in record) == bool(options)
        assert record["actor_train/grad_norm"] > 0 and record["critic_train/grad_norm"] > 0
    assert records[0]["kl"] == pytest.approx(0, abs=1e-5) and records[1]["kl"] > 1e-5
    for role in ("actor", "critic"):
        before, after = load_file(path / "model.safetensors"), trial.weights(2, role)
        unmoved = [name for name in before.keys() & after.keys() if np.array_equal(before[name], after[name])]
        assert not unmoved and ("score.weight" in after) == (role == "critic")
