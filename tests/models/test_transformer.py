import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.core.trees import flatten_paths
from realjax.engine.attention.choose import make_attention
from realjax.engine.attention.reference import dense_attention, packed_mask
from realjax.models.transformer import Forward
from tests.given.compare import assert_close_in_norm
from tests.given.models import CASE, FULL, PORTABLE_KERNELS, make_model, quick_jit, random_tree

SEGMENTS = np.array([[1, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]], np.int32)
POSITIONS = np.array([[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 0], range(12)], np.int32)
# Every place has a token of its own, so a row of the embedding's gradient belongs to one place.
TOKENS = np.arange(SEGMENTS.size, dtype=np.int32).reshape(SEGMENTS.shape)


@pytest.mark.parametrize("kernel", PORTABLE_KERNELS)
@pytest.mark.parametrize("window", [None, 3])
def test_no_gradient_reaches_an_earlier_logit_or_another_segment(kernel, window):
    model = make_model(vocab_size=TOKENS.size, window=window)
    params = random_tree(model)
    direction = np.random.default_rng(0).standard_normal(TOKENS.size).astype(np.float32)

    def logits(table):
        transformer = model.bind({**params, "embed": {"table": table}})
        hidden, _ = transformer(TOKENS, POSITIONS, SEGMENTS, Forward(attention_fn=make_attention(kernel, CASE)))
        return (hidden @ transformer.head_kernel() @ direction).ravel()

    influence = np.abs(quick_jit(jax.jacrev(logits))(params["embed"]["table"])).sum(-1)
    mask = np.asarray(packed_mask(SEGMENTS, SEGMENTS, 0, window))
    reach = np.zeros_like(influence, bool)
    for row in range(2):
        one_layer = np.linalg.matrix_power(mask[row].astype(int), model.config.num_layers) > 0
        reach[row * 12 : row * 12 + 12, row * 12 : row * 12 + 12] = one_layer
    real = (SEGMENTS > 0).ravel()
    assert (influence[real][:, ~real] == 0).all()
    assert ((influence > 0) == reach)[real][:, real].all()


def hidden_states(model, params, attention_fn=dense_attention, **options):
    forward = Forward(attention_fn=attention_fn, **options)
    return model.bind(params)(TOKENS, POSITIONS, SEGMENTS, forward)[0]


def test_recomputing_blocks_changes_no_gradient():
    model = make_model(**FULL)
    params = random_tree(model)
    weights = np.random.default_rng(0).standard_normal((*TOKENS.shape, 32)).astype(np.float32)
    grads = [
        quick_jit(jax.grad(lambda p, fn: (hidden_states(model, p, remat_fn=fn) * weights).sum()), static_argnums=1)(
            params, remat_fn
        )
        for remat_fn in (Forward.remat_fn, jax.checkpoint)
    ]
    for tree in grads:
        assert not tree.pop("head")["kernel"].any()  # the trunk alone was asked
    assert_close_in_norm(grads[1], grads[0], 1e-6)


def test_scanning_the_layers_is_running_them_one_by_one():
    model = make_model(num_layers=3)
    params = random_tree(model)

    def unrolled(blocks, order, stacks, x, per_row):
        for layer, name in enumerate(order):
            x, _ = blocks[name](jax.tree.map(lambda leaf, i=layer: leaf[i], stacks[name]), x, per_row)
        return x, {}

    found = quick_jit(lambda p: hidden_states(model, p))(params)
    np.testing.assert_allclose(
        found, quick_jit(lambda p: hidden_states(model, p, run_layers_fn=unrolled))(params), atol=1e-5
    )
    backwards = lambda blocks, order, stacks, x, per_row: unrolled(
        blocks, order, jax.tree.map(lambda leaf: leaf[::-1], stacks), x, per_row
    )
    assert np.abs(found - hidden_states(model, params, run_layers_fn=backwards)).max() > 0.1


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_the_mlp_is_gated_by_its_activation(activation):
    torch = pytest.importorskip("torch")
    model = make_model(activation=activation)
    params = random_tree(model)
    # Attention that returns nothing leaves embedding + mlp, layer by layer.
    nothing = lambda q, k, v, segment_ids, scoring, sinks: jnp.zeros_like(q)
    x = torch.from_numpy(params["embed"]["table"][TOKENS])
    norm = lambda x, scale: x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * torch.from_numpy(np.asarray(scale))
    act = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda h: torch.nn.functional.gelu(h, approximate="tanh"),
    }[activation]
    layers = params["layers"]
    for i in range(2):
        gate, up, down = (torch.from_numpy(layers["mlp"][name]["kernel"][i]) for name in ("gate", "up", "down"))
        h = norm(x, layers["mlp_norm"]["scale"][i])
        x = x + (act(h @ gate) * (h @ up)) @ down
    expected = norm(x, params["norm"]["scale"])
    np.testing.assert_allclose(hidden_states(model, params, attention_fn=nothing), expected, atol=1e-5)


def test_heads_are_the_embedding_a_vocabulary_or_a_scalar():
    tied, untied = make_model(tied=True), make_model()
    assert "head" not in tied.abstract and untied.abstract["head"]["kernel"].shape == (32, 96)
    params = random_tree(tied)
    np.testing.assert_array_equal(tied.bind(params).head_kernel(), params["embed"]["table"].T)
    critic = make_model(is_critic=True)
    assert critic.abstract["head"]["kernel"].shape == (32, 1)
    trunk = lambda model: {path for path in flatten_paths(model.abstract) if not path.startswith("head")}
    assert trunk(critic) == trunk(tied) == trunk(untied)
