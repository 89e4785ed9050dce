"""DPO and its variants are plain PyTorch's, however pairs are packed, and read nothing but answers."""

import jax
import numpy as np
import pytest

from realjax.algorithms.dpo import DPOParameters, dpo_loss, make_dpo_loss
from realjax.core.metrics import finalize, summarize
from realjax.data.packing import pack, pack_rows
from tests.algorithms.pair_cases import SPREADS, halves, make_pairs, mean_loss_and_gradients
from tests.given.compare import assert_close_in_norm

torch = pytest.importorskip("torch")
from tests.parity.theirs import make_ours, make_theirs, randomize, to_ours  # noqa: E402 - needs torch

VARIANTS = {
    "sigmoid": DPOParameters(),
    "smoothed": DPOParameters(beta=0.3, label_smoothing=0.2),
    "ipo": DPOParameters(beta=0.2, loss_type="ipo"),
    "reference-free": DPOParameters(beta=0.05, reference_free=True),
}
# The plain loss in every layout, its variants in one.
CASES = [("sigmoid", name) for name in SPREADS] + [(name, "dp2 tp2 zero3") for name in VARIANTS if name != "sigmoid"]


@pytest.fixture(scope="module")
def actor():
    return make_theirs("llama")


@pytest.fixture(scope="module")
def pairs(actor):
    """Pairs with the log-probabilities of a reference unlike the actor."""
    reference = randomize(make_theirs("llama"), scale=0.15)
    with torch.no_grad():
        return [
            pair
            | {"ref_logprobs": np.concatenate([their_logprobs(reference, t).numpy() for t in halves(pair, "tokens")])}
            for pair in make_pairs()
        ]


def their_logprobs(theirs, tokens):
    """Log-probability of each token given those before it, 0 for the first."""
    ids = torch.from_numpy(tokens).long()
    logprobs = theirs(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return torch.cat([logprobs.new_zeros(1), logprobs])


def their_terms(actor, pair, parameters):
    """The loss of one pair, and its two answers' log-ratios: sums, for IPO means, and the sums once more."""
    log_sigmoid = torch.nn.functional.logsigmoid
    sums, means = [], []
    for tokens, mask, reference in zip(
        *(halves(pair, k) for k in ("tokens", "loss_mask", "ref_logprobs")), strict=True
    ):
        ratios = their_logprobs(actor, tokens) - (0 if parameters.reference_free else torch.from_numpy(reference))
        sums.append(ratios[torch.from_numpy(mask)].sum())
        means.append(ratios[torch.from_numpy(mask)].mean())
    if parameters.loss_type == "ipo":
        return (means[0] - means[1] - 1 / (2 * parameters.beta)) ** 2, *means, sum(sums)
    h, smoothing = parameters.beta * (sums[0] - sums[1]), parameters.label_smoothing
    return -(1 - smoothing) * log_sigmoid(h) - smoothing * log_sigmoid(-h), *sums, sum(sums)


@pytest.mark.parametrize(("variant", "spread"), CASES)
def test_loss_gradients_and_metrics_are_those_of_pytorch(actor, pairs, variant, spread):
    parameters = VARIANTS[variant]
    losses, better, worse, both = zip(*(their_terms(actor, pair, parameters) for pair in pairs), strict=True)
    expected = torch.stack(losses).mean()
    actor.zero_grad()
    expected.backward()
    model, params = make_ours(actor)
    loss, grads, metrics = mean_loss_and_gradients(model, params, make_dpo_loss(parameters), pairs, SPREADS[spread])
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    named = {name: parameter.grad.numpy() for name, parameter in actor.named_parameters()}
    assert_close_in_norm(grads, to_ours(model, named), 1e-5)
    better, worse, both = (np.array([ratio.item() for ratio in ratios]) for ratios in (better, worse, both))
    assert metrics == pytest.approx(
        {
            "acc": (better > worse).mean(),
            "pos_score": parameters.beta * better.mean(),
            "neg_score": parameters.beta * worse.mean(),
            "margin": parameters.beta * (better - worse).mean(),
            "kl": -both.mean(),
            "n_pairs": len(pairs),
        },
        rel=1e-4,
    )


def sums_of(pairs, parameters, *, without=()):
    """Loss sums of pairs that hold the actor's log-probabilities under `logprobs`."""
    batch = SPREADS["one device"].pack(pairs)
    return dpo_loss({"logprobs": batch["logprobs"]}, batch.select(set(batch) - set(without)), parameters=parameters)


def with_logprobs(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda pair: -rng.exponential(2, len(pair["tokens"])).astype(np.float32)
    return [pair | {"logprobs": draw(pair), "ref_logprobs": draw(pair)} for pair in make_pairs(seed)]


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_an_actor_that_is_the_reference_starts_at_ln_2(beta, label_smoothing):
    pairs = [pair | {"logprobs": pair["ref_logprobs"]} for pair in with_logprobs()]
    sums = sums_of(pairs, DPOParameters(beta=beta, label_smoothing=label_smoothing))
    assert float(sums.loss.sum / sums.loss.weight) == pytest.approx(np.log(2), rel=1e-6)
    found = {name: float(value) for name, value in finalize(sums.metrics).items()}
    assert found == {"acc": 0, "pos_score": 0, "neg_score": 0, "margin": 0, "kl": 0, "n_pairs": len(pairs)}
    ipo = sums_of(pairs, DPOParameters(beta=beta, loss_type="ipo"))
    assert float(ipo.loss.sum / ipo.loss.weight) == pytest.approx(1 / (4 * beta**2), rel=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_prompts_do_not_count(variant):
    pairs = with_logprobs()
    other = [pair | {"logprobs": pair["logprobs"] + 5 * (1 - pair["loss_mask"])} for pair in pairs]
    parameters = VARIANTS[variant]
    jax.tree.map(np.testing.assert_array_equal, sums_of(other, parameters), sums_of(pairs, parameters))
    answers = [pair | {"logprobs": pair["logprobs"] + 5 * pair["loss_mask"]} for pair in pairs]
    assert float(sums_of(answers, parameters).loss.sum) != float(sums_of(pairs, parameters).loss.sum)


def test_reference_free_reads_no_reference():
    pairs = with_logprobs()
    zeros = [pair | {"ref_logprobs": np.zeros_like(pair["logprobs"])} for pair in pairs]
    free = sums_of(pairs, DPOParameters(reference_free=True), without=["ref_logprobs"])
    jax.tree.map(np.testing.assert_array_equal, free, sums_of(zeros, DPOParameters()))


def test_pairs_count_alike_whatever_their_prompt():
    """Unlike a reward model's, the loss is a mean over pairs: their weight only says that there is a pair."""
    pairs = with_logprobs()
    other = [pair | {"pair_weight": np.ones((), np.float32)} for pair in pairs]
    jax.tree.map(np.testing.assert_array_equal, sums_of(other, DPOParameters()), sums_of(pairs, DPOParameters()))


def test_ipo_is_right_about_a_pair_when_its_loss_is():
    """A long better answer: its sum of log-ratios is the lower, its mean, which the loss compares, the higher."""
    ratios = [np.full(8, -0.1), np.full(2, -0.2)]
    tokens = np.arange(10, dtype=np.int32)
    pair = {"tokens": tokens, "loss_mask": np.ones(10, bool), "part_lens": np.array([8, 2])}
    pair |= {"pair_weight": np.float32(1), "ref_logprobs": np.zeros(10, np.float32)}
    batch = pack([pair | {"logprobs": np.concatenate(ratios).astype(np.float32)}], pack_rows([10], 16))
    metrics_of = lambda p: summarize([dpo_loss({"logprobs": batch["logprobs"]}, batch, parameters=p).metrics])
    means, sums = metrics_of(DPOParameters(beta=0.5, loss_type="ipo")), metrics_of(DPOParameters(beta=0.5))
    assert (means["acc"], sums["acc"]) == (1, 0)
    assert means["margin"] == pytest.approx(0.5 * 0.1) and sums["margin"] == pytest.approx(0.5 * -0.4)
    assert means["kl"] == sums["kl"] == pytest.approx(1.2)


def test_smoothed_labels_are_refused_where_the_loss_has_none():
    with pytest.raises(ValueError, match="label_smoothing: found 0.1 with loss_type=ipo, whose loss has no labels"):
        DPOParameters(loss_type="ipo", label_smoothing=0.1)
