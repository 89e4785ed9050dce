"""What a step of PPO reports equals a plain float64 computation, in transformers and loops, from its rollout."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from realjax.data.packing import unpack
from realjax.hf.save import save_hf
from tests.given.compare import as_numbers
from tests.given.models import quick_compiles
from tests.given.runs import build_rl_spec, load_executor
from tests.given.texts import VOCAB

torch = pytest.importorskip("torch")
torch.set_num_threads(1)  # its threads would fight with those of the other test processes

KL, DISCOUNT, LAMBDA, TEMPERATURE, SCALING, CLIP = 0.3, 0.95, 0.9, 0.8, 10.0, 0.05
OPTIONS = {
    "algo__kl_ctl": KL,
    "algo__discount": DISCOUNT,
    "algo__gae_lambda": LAMBDA,
    "algo__ppo_n_minibatches": 1,
    "algo__eps_clip": CLIP,
    # The limits on ratios are for another test: here the update is to be made whatever they are.
    "algo__early_stop_imp_ratio": "null",
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """A first step: its metrics by call, its sequences, and the models before it."""

    metrics: dict[str, dict[str, float]]
    sequences: list[dict[str, np.ndarray]]
    models: dict[str, Any]
    is_masked: bool


@pytest.fixture(
    scope="module",
    params=[pytest.param(True, id="kept tokens"), pytest.param(False, id="all tokens", marks=pytest.mark.slow)],
)
def step(request, given, tmp_path_factory) -> Step:
    folder: Path = tmp_path_factory.mktemp("rl")
    saved = folder / "saved"
    saved.mkdir()
    spec = build_rl_spec(
        given, folder, **OPTIONS, ref__path=given.ref, algo__gen__force_no_logits_mask=not request.param
    )
    with quick_compiles():
        executor = load_executor(spec)
        for name, role in executor.roles.items():
            save_hf(executor.params(name), role.model.config, saved / name, source_dir=given.actor, dtype="float32")
        result = executor.step(spec.loader.batch(0), 0)
    return Step(
        metrics={call: as_numbers(updates)[0] for call, updates in result.metrics.items()},
        sequences=unpack(result.batch),
        models={name: load_model(saved / name, is_critic=name in ("rew", "critic")) for name in executor.roles},
        is_masked=request.param,
    )


def load_model(path: Path, *, is_critic: bool) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = AutoModelForSequenceClassification if is_critic else AutoModelForCausalLM
    model: Any = kind.from_pretrained(path)
    return model.double()


def plain_logprobs(model: Any, sequence: dict[str, np.ndarray], is_masked: bool) -> Any:
    """Returns the log-probability of each response token in the distribution it was drawn from."""
    tokens = torch.tensor(sequence["tokens"][None].astype(np.int64))
    logits = model(tokens).logits[0] / TEMPERATURE
    logprobs = []
    for t in np.flatnonzero(sequence["loss_mask"]):
        row = logits[t - 1]
        if is_masked and sequence["kept"][t].any():
            bits = np.unpackbits(np.ascontiguousarray(sequence["kept"][t]).view(np.uint8), bitorder="little")[:VOCAB]
            row = row.masked_fill(torch.tensor(bits == 0), -torch.inf)
        logprobs.append(torch.log_softmax(row, 0)[int(sequence["tokens"][t])])
    return torch.stack(logprobs)


def plain_values(model: Any, sequence: dict[str, np.ndarray]) -> Any:
    """Returns the scalar head's output after each token."""
    tokens = torch.tensor(sequence["tokens"][None].astype(np.int64))
    return model.score(model.model(tokens).last_hidden_state)[0, :, 0]


def grad_norm(model: Any, loss: Any) -> float:
    model.zero_grad()
    loss.backward()
    return float(torch.sqrt(sum((p.grad**2).sum() for p in model.parameters() if p.grad is not None)))


def test_log_probabilities_values_and_rewards(step):
    for sequence in step.sequences:
        mask = sequence["loss_mask"]
        close = lambda found, expected: np.testing.assert_allclose(found, expected.detach(), rtol=1e-4, atol=1e-4)
        close(sequence["ref_logprobs"][mask], plain_logprobs(step.models["ref"], sequence, step.is_masked))
        if step.is_masked:
            close(sequence["logprobs"][mask], plain_logprobs(step.models["actor"], sequence, True))
        close(sequence["values"], plain_values(step.models["critic"], sequence))
        close(sequence["rewards"], SCALING * plain_values(step.models["rew"], sequence)[-1])
    ended = [bool(sequence["has_eos"]) for sequence in step.sequences]
    assert any(ended) and not all(ended)


def plain_advantages(sequence: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns advantages, returns, and values before each response token."""
    start = int(np.argmax(sequence["loss_mask"]))
    values = 0.1 * sequence["values"].astype(np.float64)  # statistics without data: mean 0, standard deviation 0.1
    kl = sequence["logprobs"].astype(np.float64) - sequence["ref_logprobs"]
    advantages, last = [], 0.0
    following = 0.0 if sequence["has_eos"] else values[-1]
    for t in reversed(range(start, len(values))):
        reward = -KL * kl[t]
        if t == len(values) - 1 and sequence["has_eos"]:
            reward += np.clip(sequence["rewards"], -20, 20)
        last = reward + DISCOUNT * following - values[t - 1] + DISCOUNT * LAMBDA * last
        advantages.append(last)
        following = values[t - 1]
    advantages, before = np.array(advantages[::-1]), values[start - 1 : -1]
    return advantages, advantages + before, before


def test_metrics_and_gradients(step):
    parts = [plain_advantages(sequence) for sequence in step.sequences]
    advantages, returns, before = (np.concatenate(column) for column in zip(*parts))
    joined = lambda key: np.concatenate([s[key][s["loss_mask"]].astype(np.float64) for s in step.sequences])
    old, reference = joined("logprobs"), joined("ref_logprobs")
    expected = {
        "task_reward": np.mean([s["rewards"] for s in step.sequences]),
        "kl": np.mean(old - reference),
        "kl_reward": -KL * np.mean(old - reference),
        "advantage": advantages.mean(),
        "advantage_std": advantages.std(),
        "returns": returns.mean(),
        "returns_std": returns.std(),
        "values": before.mean(),
        "explained_variance": 1 - np.var(returns - before) / np.var(returns),
        "entropy_estimate": -old.mean(),
        "eos_share": np.mean([s["has_eos"] for s in step.sequences]),
        "avg_seq_len": np.mean([len(s["tokens"]) for s in step.sequences]),
        "n_tokens": len(old),
        "n_seqs": len(step.sequences),
    }
    assert_metrics(step.metrics["advantages"], expected)
    assert abs(expected["kl"]) > 0.1

    whitened = torch.tensor((advantages - advantages.mean()) / (advantages.std() + 1e-5))
    new = torch.cat([plain_logprobs(step.models["actor"], s, step.is_masked) for s in step.sequences])
    ratio = torch.exp(new - torch.tensor(old))
    clipped = torch.clip(ratio, 1 - CLIP, 1 + CLIP)
    losses = torch.maximum(-whitened * ratio, -whitened * clipped)
    expected = {
        "loss": losses.mean().item(),
        "actor_loss": losses.mean().item(),
        "importance_weight": ratio.mean().item(),
        "actor_clip_ratio": (whitened * ratio > whitened * clipped).double().mean().item(),
        "ppo_approx_kl": (new.detach().numpy() - old).mean(),
        "grad_norm": grad_norm(step.models["actor"], losses.mean()),
    }
    assert_metrics(step.metrics["actor_train"], expected)
    # The two cases are what they are for.
    assert (abs(expected["importance_weight"] - 1) < 1e-5) == step.is_masked
    assert (expected["actor_clip_ratio"] == 0) == step.is_masked

    targets = torch.tensor(np.clip((returns - returns.mean()) / max(returns.std(), 0.1), -5, 5))
    values = torch.cat([plain_values(step.models["critic"], s)[:-1][s["loss_mask"][1:]] for s in step.sequences])
    loss = torch.mean((values - targets) ** 2) / 2
    expected = {
        "value_loss": loss.item(),
        "values": values.mean().item(),
        "value_targets": targets.mean().item(),
        "value_clip_ratio": 0.0,
        "grad_norm": grad_norm(step.models["critic"], loss),
    }
    assert_metrics(step.metrics["critic_train"], expected)


def assert_metrics(found: dict[str, float], expected: dict[str, Any]) -> None:
    """Fails unless the metrics that are expected are there, and equal."""
    expected = {name: float(value) for name, value in expected.items()}
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=2e-3, abs=2e-5)
