"""Tokens sent to the devices of their experts alone, against all experts in one place; sending is emulated on CPUs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from realjax.engine import dispatch, experts
from realjax.engine.experts import saved_bytes, share_experts
from realjax.models.products import Routed
from tests.given.models import make_layout, quick_jit

ROWS, TIME, WIDTH, CHOSEN, EXPERTS = 8, 6, 5, 3, 8


def emulate(x, num_rows, starts, sizes, places, arriving):
    """As `send_rows`: every device looks at what all of them send."""
    me, number = jax.lax.axis_index("expert"), jax.lax.axis_size("expert")
    every, starts, sizes, places = (jax.lax.all_gather(a, "expert") for a in (x, starts, sizes, places))
    out = jnp.zeros((num_rows, *x.shape[1:]), x.dtype)
    for sender in range(number):
        at = jnp.arange(num_rows) - places[sender, me]
        comes = (at >= 0) & (at < arriving[sender])
        out = jnp.where(comes[:, None], every[sender, starts[sender, me] + at], out)
    return out


def run_plainly(routed: Routed, params) -> jax.Array:
    """Returns the weighted sums of the experts' outputs; a number beyond them is no expert."""
    up, down = (jnp.concatenate([kernel, jnp.zeros_like(kernel[:1])]) for kernel in (params["up"], params["down"]))
    ids = jnp.minimum(routed.ids, len(up) - 1)
    hidden = jnp.tanh(jnp.einsum("rtd,rtkdf->rtkf", routed.x, up[ids]))
    return jnp.einsum("rtkf,rtkfd,rtk->rtd", hidden, down[ids], routed.weights)


@pytest.mark.parametrize("layout", [{"dp": 4, "ep": 4}, {"dp": 4, "ep": 2, "tp": 2}], ids=str)
@pytest.mark.parametrize("chosen", ["any", "one for all", "none"])
def test_tokens_come_to_their_experts_and_back(layout, chosen, monkeypatch):
    """Values and all gradients; where all tokens want the same experts, one device gets every token."""
    monkeypatch.setattr(dispatch, "send_rows", emulate)
    monkeypatch.setattr(experts, "WORTHWHILE", 0)
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    x, weights = draw(ROWS, TIME, WIDTH), draw(ROWS, TIME, CHOSEN)
    ids = rng.permuted(np.tile(np.arange(EXPERTS), (ROWS, TIME, 1)), axis=2)[..., :CHOSEN]
    ids = {"any": np.where(rng.random(ids.shape) < 0.8, ids, EXPERTS), "none": np.full_like(ids, EXPERTS)}.get(
        chosen, np.broadcast_to(np.arange(CHOSEN), ids.shape)
    )
    params = {"up": draw(EXPERTS, WIDTH, 4), "down": draw(EXPERTS, 4, WIDTH)}
    mesh = make_layout(**layout).mesh
    tokens = P(("data", "expert"), "tensor")
    specs = (tokens, {"up": P("expert", None, "tensor"), "down": P("expert", "tensor")})
    axes = ("expert", "tensor") if mesh.shape["tensor"] > 1 else ("expert",)
    shared = share_experts(run_plainly, axes, can_send=True)
    run = jax.shard_map(shared, mesh=mesh, in_specs=specs, out_specs=tokens, check_vma=False)

    @partial(quick_jit, static_argnums=0)
    def outcome(fn, x, weights, params):
        y, pullback = jax.vjp(
            lambda x, weights, params: fn(Routed(x, jnp.asarray(ids), weights), params), x, weights, params
        )
        return y, pullback(jnp.cos(y))

    close = lambda found, expected: np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, outcome(run, x, weights, params), outcome(run_plainly, x, weights, params))


def test_what_is_saved_is_what_tokens_that_choose_alike_do_not_need():
    rng, (parts, chosen, tokens) = np.random.default_rng(0), (4, 2, 20000)
    dest = rng.integers(parts, size=(tokens, chosen))  # of many experts
    sent = sum(np.any(dest == part, axis=1).mean() for part in range(1, parts))
    x = np.zeros((tokens, 8), np.float16)
    assert saved_bytes(jnp.asarray(x), chosen, parts) == pytest.approx(2 * x.nbytes * (parts - 1 - sent), rel=0.02)
