import numpy as np
import pytest

from realjax.core.optimizer_config import OptimizerConfig

SHAPES = ["linear", "cosine", "constant"]


def rates(total: int, **options) -> np.ndarray:
    config = OptimizerConfig(**{"lr": 0.1, **options})
    return np.array([config.learning_rate(step, total) for step in range(total)])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("total", [1, 2, 7, 100])
@pytest.mark.parametrize("proportion", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("min_lr_ratio", [0.0, 0.25])
def test_a_schedule_rises_to_lr_then_falls_towards_its_floor(shape, total, proportion, min_lr_ratio):
    found = rates(total, lr_scheduler_type=shape, warmup_steps_proportion=proportion, min_lr_ratio=min_lr_ratio)
    num_warmup = int(proportion * total)
    warmup, decay = found[:num_warmup], found[num_warmup:]
    np.testing.assert_allclose(warmup, 0.1 * np.arange(1, num_warmup + 1) / max(num_warmup, 1), rtol=1e-6)
    if shape == "constant":
        np.testing.assert_allclose(decay, 0.1, rtol=1e-6)
    elif len(decay):
        assert decay[0] == pytest.approx(0.1) and (np.diff(decay) < 0).all()
        # Every update learns; the floor would be the next one's rate.
        progress = np.arange(len(decay)) / len(decay)
        shares = 1 - progress if shape == "linear" else (1 + np.cos(np.pi * progress)) / 2
        np.testing.assert_allclose(decay, 0.1 * (min_lr_ratio + (1 - min_lr_ratio) * shares), rtol=1e-5, atol=1e-8)
    assert (found > 0).all()


def test_a_linear_decay_is_straight_and_a_cosine_is_halfway_at_half_time():
    np.testing.assert_allclose(
        np.diff(rates(50, lr_scheduler_type="linear", warmup_steps_proportion=0)), -0.002, rtol=1e-4
    )
    cosine = rates(100, lr_scheduler_type="cosine", warmup_steps_proportion=0, min_lr_ratio=0.5)
    assert cosine[50] == pytest.approx(0.075) and cosine[25] == pytest.approx(0.05 + 0.05 * (2 + 2**0.5) / 4)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_past_the_end_stays_at_the_end(shape):
    config = OptimizerConfig(lr=0.1, lr_scheduler_type=shape, min_lr_ratio=0.1)
    assert config.learning_rate(150, 100) == config.learning_rate(100, 100)
    assert config.learning_rate(100, 100) == pytest.approx(0.1 if shape == "constant" else 0.01)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("total", [1, 2, 9])
@pytest.mark.parametrize("num_warmup", [0, 1, 4])
def test_rates_are_those_of_transformers_begun_one_update_later(shape, total, num_warmup):
    """Its update 0 has a rate of 0 where there is a warm-up, and learns nothing: ours are its updates from 1 on."""
    torch, optimization = pytest.importorskip("torch"), pytest.importorskip("transformers.optimization")
    num_warmup = min(num_warmup, total - 1)
    config = OptimizerConfig(lr=0.1, lr_scheduler_type=shape, warmup_steps_proportion=num_warmup / total)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    name = "constant_with_warmup" if shape == "constant" else shape
    schedule = optimization.get_scheduler(name, optimizer, num_warmup, num_training_steps=total)
    theirs = []
    for _ in range(total + 1):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    ours = [float(config.learning_rate(number, total)) for number in range(total)]
    expected = [*theirs[1 : num_warmup + 1], *theirs[num_warmup:total]]
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "name, value",
    [
        ("lr", -1e-5),
        ("weight_decay", -0.1),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("eps", 0.0),
        ("min_lr_ratio", 1.5),
        ("warmup_steps_proportion", 2.0),
        ("gradient_clipping", 0.0),
        ("lr", float("nan")),
    ],
)
def test_values_outside_their_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name}: found {value}; it must be"):
        OptimizerConfig(**{name: value})
