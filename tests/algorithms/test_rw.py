"""The reward loss is plain PyTorch's, however pairs are packed, and reads nothing but last tokens."""

import jax
import numpy as np
import pytest

from realjax.algorithms.rw import REWARD_LOSS, reward_loss
from realjax.core.metrics import finalize
from tests.algorithms.pair_cases import GROUPS, SPREADS, halves, make_pairs, mean_loss_and_gradients
from tests.given.compare import assert_close_in_norm

torch = pytest.importorskip("torch")
import transformers  # noqa: E402 - needs torch for its models

from tests.given.models import SIZES  # noqa: E402
from tests.parity.theirs import make_ours, randomize, to_ours  # noqa: E402


@pytest.fixture(scope="module")
def theirs():
    changes: dict = {"num_hidden_layers": 2, "num_labels": 1, "architectures": ["LlamaForSequenceClassification"]}
    config = transformers.LlamaConfig(**{**SIZES, **changes})
    return randomize(transformers.LlamaForSequenceClassification(config))


def their_score(theirs, tokens):
    hidden = theirs.model(torch.from_numpy(tokens).long()[None])[0]
    return theirs.score(hidden[0, -1])[0]


@pytest.mark.parametrize("spread", SPREADS.values(), ids=SPREADS)
def test_loss_and_gradients_are_those_of_pytorch(theirs, spread):
    pairs = make_pairs()
    scores = [[their_score(theirs, tokens) for tokens in halves(pair, "tokens")] for pair in pairs]
    weights = [float(pair["pair_weight"]) for pair in pairs]
    terms = [
        -weight * torch.nn.functional.logsigmoid(better - worse)
        for weight, (better, worse) in zip(weights, scores, strict=True)
    ]
    expected = torch.stack(terms).sum() / len(GROUPS)
    theirs.zero_grad()
    expected.backward()
    model, params = make_ours(theirs)
    loss, grads, metrics = mean_loss_and_gradients(model, params, REWARD_LOSS, pairs, spread)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    named = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    assert_close_in_norm(grads, to_ours(model, named), 1e-5)
    better, worse = np.array([[score.item() for score in pair] for pair in scores]).T
    assert metrics == pytest.approx(
        {
            "acc": (better > worse).mean(),
            "pos_score": better.mean(),
            "neg_score": worse.mean(),
            "margin": (better - worse).mean(),
            "n_pairs": len(pairs),
        },
        rel=1e-4,
    )


def sums_of(pairs, spread=SPREADS["one device"]):
    """Loss sums of pairs that hold the scalar head's outputs under `values`."""
    batch = spread.pack(pairs)
    return reward_loss({"values": batch["values"]}, batch)


def with_values(pairs, seed=0):
    rng = np.random.default_rng(seed)
    return [pair | {"values": rng.standard_normal(len(pair["tokens"])).astype(np.float32)} for pair in pairs]


def test_only_the_score_of_the_last_token_counts():
    pairs = with_values(make_pairs())
    other = [pair | {"values": pair["values"].copy()} for pair in pairs]
    for pair in other:
        for values in halves(pair, "values"):
            values[:-1] += 1
    jax.tree.map(np.testing.assert_array_equal, sums_of(other), sums_of(pairs))
    last = halves(other[3], "values")[1]
    last[-1] += 1
    assert float(sums_of(other).loss.sum) > float(sums_of(pairs).loss.sum)


@pytest.mark.parametrize("seed", range(3))
def test_a_prompt_counts_once_however_many_pairs_it_has(seed):
    """Each prompt's pairs repeated three times, at a third of the weight, are the same loss."""
    pairs = with_values(make_pairs(seed), seed)
    repeated = [pair | {"pair_weight": pair["pair_weight"] / 3} for pair in pairs for _ in range(3)]
    spread = SPREADS["one device"]
    many = type(spread)(row_len=48, order=tuple(range(len(repeated))), num_rows=3 * spread.num_rows)
    once, thrice = sums_of(pairs), sums_of(repeated, many)
    assert float(once.loss.weight) == pytest.approx(len(GROUPS)) == pytest.approx(float(thrice.loss.weight))
    assert float(thrice.loss.sum) == pytest.approx(float(once.loss.sum), rel=1e-5)
    assert float(thrice.metrics["n_pairs"].sum) == 3 * float(once.metrics["n_pairs"].sum)


def test_equal_scores_are_no_hit():
    pairs = [pair | {"values": np.ones(len(pair["tokens"]), np.float32)} for pair in make_pairs()]
    sums = sums_of(pairs)
    assert float(sums.loss.sum / sums.loss.weight) == pytest.approx(np.log(2), rel=1e-6)
    found = {name: float(value) for name, value in finalize(sums.metrics).items()}
    assert found == {"acc": 0, "pos_score": 1, "neg_score": 1, "margin": 0, "n_pairs": len(pairs)}
