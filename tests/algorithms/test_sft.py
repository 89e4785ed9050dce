import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.algorithms.sft import SFT_LOSS, sft_loss
from realjax.core.metrics import finalize
from realjax.engine.train import TrainOptions, make_gradients
from tests.given.models import make_layout, make_model, quick_jit, random_tree
from tests.given.sequences import make_examples, pack_in_order, unpack_array


def make_case(seed):
    """Returns a random packed batch, its examples, their log-probabilities, and the plan; some have no target."""
    rng = np.random.default_rng(seed)
    examples = make_examples(rng.integers(1, 20, 12).tolist(), seed)
    for i in rng.choice(12, 3, replace=False):
        examples[i]["loss_mask"][:] = False
    batch, plan = pack_in_order(examples, 24, order=rng.permutation(12), num_rows=12)
    logprobs = -rng.exponential(2, batch["tokens"].shape).astype(np.float32)
    return batch, examples, logprobs, plan


@pytest.mark.parametrize("seed", range(5))
def test_loss_and_metrics_are_those_of_plain_loops(seed):
    batch, examples, logprobs, plan = make_case(seed)
    nll, num_targets, ppls = 0.0, 0, []
    for example, values in zip(examples, unpack_array(logprobs, plan)):
        targets = values[example["loss_mask"]]
        nll -= targets.sum()
        num_targets += len(targets)
        if len(targets):
            ppls.append(np.exp(-targets.mean()))
    sums = sft_loss({"nll": jnp.float32(nll), "logprobs": logprobs}, batch)
    assert float(sums.loss.sum) == pytest.approx(nll) and float(sums.loss.weight) == num_targets
    found = {name: float(value) for name, value in finalize(sums.metrics).items()}
    assert found == pytest.approx({"ppl": np.mean(ppls), "n_tokens": num_targets, "n_seqs": len(ppls)}, rel=1e-5)


def test_the_loss_of_two_halves_adds_up():
    batch, _, logprobs, _ = make_case(0)
    nll = jnp.sum(-logprobs * batch["loss_mask"])
    parts = [
        sft_loss(
            {"nll": jnp.sum(-logprobs[rows] * batch["loss_mask"][rows]), "logprobs": logprobs[rows]}, batch.rows(rows)
        )
        for rows in (slice(0, 5), slice(5, 12))
    ]
    whole = sft_loss({"nll": nll, "logprobs": logprobs}, batch)
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a + b, c, rtol=1e-5), *parts, whole)


def test_a_batch_without_targets_has_a_zero_gradient_and_no_nan():
    batch, *_ = make_case(0)
    model, masked = make_model(), {**batch.arrays, "loss_mask": np.zeros(batch["tokens"].shape, bool)}
    gradients = make_gradients(model, SFT_LOSS, make_layout(), TrainOptions())
    grads, sums = quick_jit(gradients)(random_tree(model), type(batch).of(**masked))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))
    assert [float(x) for x in (sums.loss.sum, sums.loss.weight, sums.metrics["ppl"].sum)] == [0, 0, 0]
