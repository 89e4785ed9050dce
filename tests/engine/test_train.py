import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.algorithms.sft import SFT_LOSS
from realjax.core.axes import train_rules
from realjax.core.batch import Batch
from realjax.core.compute import Compute
from realjax.core.loss import Loss, LossSums
from realjax.core.metrics import Mean, Total, summarize
from realjax.core.optimizer_config import OptimizerConfig
from realjax.engine.compiled import place_batch
from realjax.engine.optim import Optimizer
from realjax.engine.rows import deal_rows
from realjax.engine.state import init_train_state, train_state_shardings
from realjax.engine.train import TrainOptions, make_gradients, make_train_step
from tests.given.compare import assert_bitwise_equal, assert_close_in_norm
from tests.given.models import make_layout, make_model, place_params, quick_jit, random_tree
from tests.given.sequences import make_examples, pack_in_order

MODEL = make_model()
CONFIG = OptimizerConfig(lr=1e-2, lr_scheduler_type="constant", warmup_steps_proportion=0.0)
OPTIMIZER = Optimizer(config=CONFIG, total_updates=10)
BATCH = pack_in_order(make_examples([9, 30, 17, 3, 22, 8, 14]), 32, num_rows=8)[0]


def poisoned_loss(outputs, batch) -> LossSums:
    """The SFT loss with an offset that has no gradient, and a gradient with a factor that the value does not show."""
    weight = jnp.sum(batch["loss_mask"].astype(jnp.float32))
    nll, (offset, factor) = outputs["nll"], batch["rewards"][0]  # a key that no loss of its kind reads
    loss = nll + offset + factor * (nll - jax.lax.stop_gradient(nll))
    return LossSums(Mean(loss, weight), {"n_tokens": Total(weight)})


def make_step(layout, loss=SFT_LOSS):
    shardings = train_state_shardings(MODEL, OPTIMIZER, layout)
    state = init_train_state(place_params(MODEL, random_tree(MODEL), layout), OPTIMIZER, shardings)
    step = make_train_step(MODEL, loss, OPTIMIZER, layout, TrainOptions())
    return quick_jit(step, out_shardings=(shardings, layout.replicated)), state


@pytest.mark.parametrize("layout", [{}, {"pp": 2}], ids=str)
def test_remat_saves_most_of_the_memory_of_activations(layout):
    """With what is chosen by default for this platform: a compiler may find what is computed anew, and keep it."""
    layout, model = make_layout(**layout), make_model(num_layers=8)
    params = place_params(model, random_tree(model), layout)
    batch = place_batch(pack_in_order(make_examples([128] * 16), 128)[0], train_rules(layout.strategy), layout)

    def scratch_bytes(remat: bool) -> int:
        options = TrainOptions(compute=Compute(remat=remat))
        gradients = jax.jit(make_gradients(model, SFT_LOSS, layout, options))
        return gradients.lower(params, batch).compile().memory_analysis().temp_size_in_bytes

    assert scratch_bytes(remat=True) < 0.6 * scratch_bytes(remat=False)


def test_an_update_takes_no_memory_beside_the_gradients():
    """Of parameters that outweigh the batch: what is overwritten is read by nothing that comes later."""
    model, layout = make_model(vocab_size=4096, hidden_size=96, head_dim=12), make_layout()
    shardings = train_state_shardings(model, OPTIMIZER, layout)
    state = init_train_state(place_params(model, random_tree(model), layout), OPTIMIZER, shardings)
    batch = place_batch(pack_in_order(make_examples([8]), 8)[0], train_rules(layout.strategy), layout)
    step = jax.jit(
        make_train_step(model, SFT_LOSS, OPTIMIZER, layout, TrainOptions(compute=Compute(remat=True))),
        donate_argnums=0,
    )
    scratch = step.lower(state, batch).compile().memory_analysis().temp_size_in_bytes
    assert scratch < 1.3 * 4 * model.num_params


POISONS = {"loss": (np.inf, 0.0), "gradient": (0.0, 3e38), "both": (0.0, np.nan)}


def trained(state) -> dict:
    return {"params": state.params, "opt": {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(state.opt_state))}}


@pytest.mark.parametrize("layout", [{}, {"dp": 2, "tp": 2, "zero": 3, "sp": True}], ids=str)
def test_an_update_that_is_not_finite_changes_nothing_and_is_counted(layout):
    layout = make_layout(**layout)
    step, state = make_step(layout, Loss(head="nll", fn=poisoned_loss))

    def run(state, poison):
        batch = BATCH.with_arrays(rewards=np.tile(poison, (8, 1)))
        return step(state, place_batch(batch, train_rules(layout.strategy), layout))

    state, _ = run(state, (0.0, 0.0))
    before = jax.tree.map(np.array, trained(state))
    for count, (where, poison) in enumerate(POISONS.items(), start=1):
        state, metrics = run(state, poison)
        numbers = summarize([metrics])
        assert bool(np.isfinite(numbers["loss"])) == (where == "gradient")
        assert bool(np.isfinite(numbers["grad_norm"])) == (where == "loss")
        assert int(state.num_skipped) == numbers["num_skipped"] == count
        assert int(state.num_updates) == 1 + count
        assert_bitwise_equal(trained(state), before)
    state, metrics = run(state, (0.0, 0.0))
    assert (int(state.num_updates), int(state.num_skipped)) == (5, 0) and np.isfinite(summarize([metrics])["loss"])
    assert (np.asarray(state.params["norm"]["scale"]) != before["params"]["norm"]["scale"]).any()


@pytest.mark.parametrize("total", [1, 4])
def test_every_update_learns_at_the_rate_that_is_reported(total):
    """Also after skipped ones: the decay ends with the run. Without gradients weights only decay, by that rate."""
    config = OptimizerConfig(lr=0.1, lr_scheduler_type="linear", weight_decay=0.5, warmup_steps_proportion=0)
    optimizer, layout = Optimizer(config=config, total_updates=total), make_layout()
    shardings = train_state_shardings(MODEL, optimizer, layout)
    state = init_train_state(place_params(MODEL, random_tree(MODEL), layout), optimizer, shardings)
    step = make_train_step(MODEL, Loss(head="nll", fn=poisoned_loss), optimizer, layout, TrainOptions())
    step = quick_jit(step, out_shardings=(shardings, layout.replicated))
    nothing = BATCH.replace_arrays(loss_mask=np.zeros(BATCH["tokens"].shape, bool))
    applied, reported = [], []
    for number in range(total):
        offset = np.inf if number == 1 else 0
        before = np.array(state.params["layers"]["mlp"]["down"]["kernel"])
        state, metrics = step(state, nothing.with_arrays(rewards=np.tile([offset, 0.0], (8, 1))))
        after = np.asarray(state.params["layers"]["mlp"]["down"]["kernel"])
        applied.append(float(np.sum(before * (before - after)) / np.sum(before * before)) / config.weight_decay)
        reported.append(summarize([metrics])["lr"])
    assert reported == pytest.approx([0.1 * (1 - number / total) for number in range(total)], rel=1e-5)
    expected = [rate if number != 1 else 0 for number, rate in enumerate(reported)]
    assert applied == pytest.approx(expected, rel=1e-4)


def test_training_on_one_batch_lowers_its_loss():
    step, state = make_step(make_layout())
    losses = []
    for _ in range(10):
        state, metrics = step(state, BATCH)
        losses.append(summarize([metrics])["loss"])
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.5


def test_a_batch_without_targets_is_an_update_of_zero_gradient():
    step, state = make_step(make_layout())
    nothing = Batch.of(**{**BATCH.arrays, "loss_mask": np.zeros(BATCH["tokens"].shape, bool)})
    state, metrics = step(state, nothing)
    # No mean of a loss either, and no perplexity.
    assert summarize([metrics]) == pytest.approx(
        {"grad_norm": 0, "lr": CONFIG.lr, "n_tokens": 0, "n_seqs": 0, "num_skipped": 0}
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_micro_batches_are_every_nth_row_and_all_of_them():
    parts = deal_rows(BATCH, 4)
    for key in BATCH:
        assert parts[key].shape == (4, 2, *BATCH[key].shape[1:])
        for i in range(4):
            np.testing.assert_array_equal(parts[key][i], BATCH[key][i::4])


def test_a_loss_on_logprobs_has_the_gradients_of_the_fused_one():
    def of_logprobs(outputs, batch) -> LossSums:
        mask = batch["loss_mask"].astype(jnp.float32)
        return LossSums(Mean(-jnp.sum(outputs["logprobs"] * mask), jnp.sum(mask)), {})

    layout = make_layout(dp=2, tp=2, sp=True)
    params = place_params(MODEL, random_tree(MODEL), layout)
    batch = place_batch(BATCH, train_rules(layout.strategy), layout)
    (grads, sums), (expected, expected_sums) = (
        quick_jit(make_gradients(MODEL, loss, layout, TrainOptions(num_mbs=2)))(params, batch)
        for loss in (Loss(head="logprobs", fn=of_logprobs), SFT_LOSS)
    )
    assert float(sums.loss.sum) == pytest.approx(float(expected_sums.loss.sum), rel=1e-6)
    assert_close_in_norm(grads, jax.tree.map(np.asarray, expected), 1e-5)


def test_micro_batches_that_leave_a_device_without_a_row_are_refused():
    layout = make_layout(dp=8)
    batch = place_batch(BATCH, train_rules(layout.strategy), layout)
    gradients = make_gradients(MODEL, SFT_LOSS, layout, TrainOptions(num_mbs=2))
    with pytest.raises(ValueError, match=r"'rows'\) of size 4 does not divide over mesh axis 'data' of size 8"):
        jax.eval_shape(gradients, random_tree(MODEL), batch)
