import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from realjax.core.optimizer_config import OptimizerConfig
from realjax.core.trees import Tree, flatten_paths
from realjax.engine.optim import Optimizer, clip_by_norm, decay_mask
from realjax.models.build import build_model
from tests.given.compare import assert_close_in_norm
from tests.given.models import FAMILY_CONFIGS, FULL, make_model, quick_jit, random_tree

MODEL = make_model(**FULL)


def adamw_of_torch(params: Tree, grads: list[Tree], config: OptimizerConfig) -> Tree:
    """Returns the parameters after PyTorch's clipping and AdamW with its own decay groups and our schedule."""
    torch = pytest.importorskip("torch")
    # Copies: PyTorch writes in place.
    tensors = {path: torch.tensor(leaf, requires_grad=True) for path, leaf in flatten_paths(params).items()}
    is_plain = lambda path: any(word in path for word in ("norm", "bias"))
    groups = [
        {"params": [t for path, t in tensors.items() if is_plain(path)], "weight_decay": 0.0},
        {"params": [t for path, t in tensors.items() if not is_plain(path)], "weight_decay": config.weight_decay},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)
    for step, tree in enumerate(grads):
        for path, grad in flatten_paths(tree).items():
            tensors[path].grad = torch.tensor(grad)
        torch.nn.utils.clip_grad_norm_(tensors.values(), config.gradient_clipping)
        for group in optimizer.param_groups:
            group["lr"] = float(config.learning_rate(step, len(grads)))
        optimizer.step()
    return {path: tensor.detach().numpy() for path, tensor in tensors.items()}


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 1e-2, "weight_decay": 0.3, "warmup_steps_proportion": 0.4, "gradient_clipping": 5.0},
        {"lr": 3e-2, "weight_decay": 0.0, "lr_scheduler_type": "constant", "beta2": 0.999, "eps": 1e-8},
        {"lr": 1e-2, "lr_scheduler_type": "linear", "min_lr_ratio": 0.5, "gradient_clipping": 1e9},
    ],
    ids=["clipped-cosine", "constant", "unclipped-linear"],
)
def test_five_updates_are_those_of_pytorchs_adamw(options):
    config = OptimizerConfig(**options)
    params = random_tree(MODEL)
    grads = [random_tree(MODEL, seed=seed, scale=0.1 * seed) for seed in range(1, 6)]
    optimizer = Optimizer(config=config, total_updates=len(grads))

    def update(params, state, grads, number):
        clipped, norm = clip_by_norm(grads, config.gradient_clipping)
        params, state = optimizer.update(clipped, state, params, number, jnp.array(True))
        return params, state, norm

    update, ours, state = quick_jit(update), params, optimizer.init(params)
    for number, tree in enumerate(grads):
        ours, state, norm = update(ours, state, tree, number)
        assert norm == pytest.approx(np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(tree))), rel=1e-6)
    theirs = adamw_of_torch(params, grads, config)
    # optax computes 1 - 0.999^t in float32, of which four digits are left at the first steps.
    assert_close_in_norm(flatten_paths(ours), theirs, 1e-6 if config.beta2 < 0.99 else 5e-6)
    moved = {path: np.abs(leaf - flatten_paths(params)[path]).max() for path, leaf in theirs.items()}
    assert min(moved.values()) > 1e-3


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_clipping_keeps_the_direction_and_caps_the_norm(scale):
    grads = jax.tree.map(lambda g: g * np.float32(scale), random_tree(MODEL))
    clipped, norm = clip_by_norm(grads, 2.0)
    expected = min(1.0, 2.0 / float(norm))
    assert optax.tree.norm(clipped) == pytest.approx(min(2.0, float(norm)), rel=1e-5)
    assert_close_in_norm(clipped, jax.tree.map(lambda g: g * expected, grads), 1e-5)


def test_clipping_leaves_zero_at_zero_and_shows_what_is_not_finite():
    zeros = jax.tree.map(jnp.zeros_like, random_tree(MODEL))
    clipped, norm = clip_by_norm(zeros, 1.0)
    assert norm == 0 and not any(leaf.any() for leaf in jax.tree.leaves(clipped))
    for bad in (np.nan, np.inf):
        zeros["norm"]["scale"] = zeros["norm"]["scale"].at[3].set(bad)
        assert not np.isfinite(clip_by_norm(zeros, 1.0)[1])


@pytest.mark.parametrize("config", [*FAMILY_CONFIGS.values(), MODEL.config], ids=[*FAMILY_CONFIGS, "everything"])
def test_exactly_norms_biases_and_offsets_of_routers_are_not_decayed(config):
    mask = flatten_paths(decay_mask(build_model(config).abstract))
    for path, decayed in mask.items():
        is_norm = "norm" in path.split("/")[-2]
        assert decayed == (not is_norm and not path.endswith(("bias", "router/offset"))), path
    assert {True, False} == set(mask.values())
