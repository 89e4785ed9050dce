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
def test_a_schedule_rises_to_lr_then_falls_to_its_floor(shape, total, proportion, min_lr_ratio):
    found = rates(total, lr_scheduler_type=shape, warmup_steps_proportion=proportion, min_lr_ratio=min_lr_ratio)
    num_warmup = int(proportion * total)
    warmup, decay = found[:num_warmup], found[num_warmup:]
    np.testing.assert_allclose(warmup, 0.1 * np.arange(1, num_warmup + 1) / max(num_warmup, 1), rtol=1e-6)
    if shape == "constant":
        np.testing.assert_allclose(decay, 0.1, rtol=1e-6)
    elif len(decay):
        assert (np.diff(decay) < 0).all() and (decay < 0.1).all()
        assert decay[-1] == pytest.approx(0.1 * min_lr_ratio, abs=1e-9)


def test_a_linear_decay_is_straight_and_a_cosine_is_halfway_at_half_time():
    np.testing.assert_allclose(
        np.diff(rates(50, lr_scheduler_type="linear", warmup_steps_proportion=0)), -0.002, rtol=1e-4
    )
    cosine = rates(100, lr_scheduler_type="cosine", warmup_steps_proportion=0, min_lr_ratio=0.5)
    assert cosine[49] == pytest.approx(0.075) and cosine[24] == pytest.approx(0.05 + 0.05 * (2 + 2**0.5) / 4)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_past_the_end_stays_at_the_end(shape):
    config = OptimizerConfig(lr=0.1, lr_scheduler_type=shape, min_lr_ratio=0.1)
    assert config.learning_rate(150, 100) == config.learning_rate(99, 100)


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
    with pytest.raises(ValueError, match=f"optimizer.{name}: found {value}; it must be"):
        OptimizerConfig(**{name: value})
