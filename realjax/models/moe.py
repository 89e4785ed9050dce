"""A mixture of experts (arXiv:1701.06538): each token goes through those few feed-forwards that a router chooses.

Nothing is dropped: an expert takes all tokens that choose it. E experts, k of them for a token, P pairs of a token and
an expert. Padding has no expert, and so costs nothing and counts nowhere.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from realjax.core.axes import Names
from realjax.core.segments import sum_by_segment
from realjax.core.trees import Tree
from realjax.models import sums
from realjax.models.attention import BlockContext
from realjax.models.config import MLPConfig, ModelConfig, MoEConfig
from realjax.models.layers import Linear, make_param
from realjax.models.mlp import ACTIVATIONS, MLP
from realjax.models.products import Products, Routed
from realjax.models.stacks import Aux


class Router(nnx.Module):
    """Scores of the experts for each token, float32 whatever the compute dtype."""

    def __init__(self, sizes: ModelConfig, config: MoEConfig) -> None:
        E = config.num_experts
        self.kernel = make_param((sizes.hidden_size, E), ("embed", "router"))
        self.bias = make_param((E,), ("router",)) if config.router_bias else None
        self.offset = make_param((E,), ("router",)) if config.has_offset else None
        self.config = config

    def __call__(self, x_RTD: Array, products: Products) -> Array:
        """Returns the logits `[R, T, E]`."""
        kernel = self.kernel[...]

        def multiply(x: Array) -> Array:
            # Where the kernel stays float32 (`Model.copy_dtype`), accelerators are not to shorten its numbers again.
            with jax.default_matmul_precision("highest" if kernel.dtype == jnp.float32 else None):
                return products.matmul(x.astype(kernel.dtype), kernel, dtype=jnp.float32)

        logits = products.over_tokens(multiply, x_RTD, "time")
        return logits if self.bias is None else sums.add_bias(logits, self.bias[...].astype(jnp.float32))

    def choose(self, logits: Array) -> Array:
        """Returns the numbers `[R, T, k]` of each token's experts, the best first."""
        config, scores = self.config, jax.lax.stop_gradient(self._score(logits))
        if self.offset is not None:
            scores = scores + jax.lax.stop_gradient(self.offset[...])
        if config.num_groups > 1:
            scores = _keep_best_groups(scores, config)
        return jax.lax.top_k(scores, config.experts_per_token)[1]

    def weigh(self, logits: Array, ids: Array) -> Array:
        """Returns the weights `[R, T, k]` of these experts, whoever has chosen them."""
        weights = jnp.take_along_axis(self._score(logits), ids, axis=-1)
        if self.config.scores == "softmax_of_chosen":
            weights = jax.nn.softmax(weights, axis=-1)
        if self.config.renormalise:
            weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
        return weights * self.config.scale

    def share(self, logits: Array) -> Array:
        """Returns all experts' shares `[R, T, E]`, which sum to 1."""
        if self.config.scores != "sigmoid":
            return jax.nn.softmax(logits, axis=-1)
        scores = jax.nn.sigmoid(logits)
        return scores / (scores.sum(axis=-1, keepdims=True) + 1e-20)

    def _score(self, logits: Array) -> Array:
        if self.config.scores == "softmax":
            return jax.nn.softmax(logits, axis=-1)
        return jax.nn.sigmoid(logits) if self.config.scores == "sigmoid" else logits


def _keep_best_groups(scores: Array, config: MoEConfig) -> Array:
    """Returns the scores with -inf for the experts of other groups (DeepSeek-V3, arXiv:2412.19437)."""
    grouped = scores.reshape(*scores.shape[:-1], config.num_groups, -1)
    best = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0].sum(axis=-1)
    chosen = jax.lax.top_k(best, config.groups_per_token)[1]
    is_kept = jnp.any(chosen[..., None] == jnp.arange(config.num_groups), axis=-2)
    return jnp.where(is_kept[..., None], grouped, -jnp.inf).reshape(scores.shape)


class ExpertsLinear(nnx.Module):
    """The kernels of one product of all experts, and biases."""

    def __init__(self, num_experts: int, in_dims: dict[str, int], out_dims: dict[str, int], bias: bool) -> None:
        dims = {"experts": num_experts, **in_dims, **out_dims}
        self.kernel = make_param(tuple(dims.values()), tuple(dims))
        # What comes out of the last product is summed before its bias is added, which no device has a part of.
        names = ("experts", "ffn") if "ffn" in out_dims else ("router", "norm")
        self.bias = make_param((num_experts, *out_dims.values()), names) if bias else None


class Experts(nnx.Module):
    """The parameters of the experts, on stacks: gate and up `[E, D, F]`, down `[E, F, D]`."""

    def __init__(self, sizes: ModelConfig, config: MoEConfig) -> None:
        E, D, F = config.num_experts, {"expert_embed": sizes.hidden_size}, {"ffn": config.expert_size}
        self.gate = ExpertsLinear(E, D, F, config.bias)
        self.up = ExpertsLinear(E, D, F, config.bias)
        self.down = ExpertsLinear(E, F, D, config.bias)
        self.config = config

    def __call__(self, routed: Routed, products: Products) -> Array:
        """Returns the sums `[R, T, D]` of what each token's experts give, by their weights."""
        up, down = ("experts", "expert_embed", "ffn"), ("experts", "ffn", "expert_embed")
        params = {"gate": self.gate.kernel[...], "up": self.up.kernel[...], "down": self.down.kernel[...]}
        names: dict[str, Names] = {"gate": up, "up": up, "down": down}
        if self.gate.bias is not None and self.up.bias is not None:
            params |= {"gate_bias": self.gate.bias[...], "up_bias": self.up.bias[...]}
            names |= {"gate_bias": ("experts", "ffn"), "up_bias": ("experts", "ffn")}
        y = products.over_experts(partial(run_experts, config=self.config, products=products), routed, params, names)
        if self.down.bias is None:
            return y
        # Of the whole sum: where an expert's hidden numbers are split over devices, each has a part of the rest.
        of_each = jnp.arange(self.config.num_experts)
        weights = jnp.sum(jnp.where(routed.ids[..., None] == of_each, routed.weights[..., None], 0), axis=-2)
        bias = self.down.bias[...]
        return y + products.over_tokens(lambda w: products.matmul(w, bias), weights.astype(y.dtype), "time")


def run_experts(routed: Routed, params: Tree, *, config: MoEConfig, products: Products) -> Array:
    """Returns the weighted sums `[R, T, D]` of the experts' outputs, without the bias of these, on the arrays at hand.

    `params` are those of as many experts as the numbers in `routed` count; they may have a part of the hidden numbers
    each, of which the result is a part of the sum.
    """
    (R, T, D), k = routed.x.shape, routed.ids.shape[-1]
    E = len(params["gate"])
    ids, weights = routed.ids.reshape(-1), routed.weights.reshape(-1, k)
    order = jnp.argsort(ids, stable=True)
    inverse = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)), unique_indices=True)
    sizes = jnp.sum(ids[:, None] == jnp.arange(E), axis=0, dtype=jnp.int32)
    x = sums.permute(jnp.repeat(routed.x.reshape(-1, D), k, axis=0), order, inverse)
    sorted_ids = ids[order]

    def multiply(name: str, x: Array) -> Array:
        y, bias = products.grouped_matmul(x, params[name], sizes), params.get(f"{name}_bias")
        return y if bias is None else y + sums.look_up(bias, sorted_ids)

    y = multiply("down", _gate(multiply("gate", x), multiply("up", x), config))
    of_token = sums.permute(y, inverse, order).reshape(-1, k, D).astype(jnp.float32)
    return jnp.sum(of_token * weights[..., None], axis=1).astype(routed.x.dtype).reshape(R, T, D)


def _gate(gate: Array, up: Array, config: MoEConfig) -> Array:
    if config.limit is None:
        return ACTIVATIONS[config.activation](gate) * up
    gate, up = jnp.minimum(gate, config.limit), jnp.clip(up, -config.limit, config.limit)
    return (up + 1) * gate * jax.nn.sigmoid(config.alpha * gate)


class SharedExpert(MLP):
    """A feed-forward that every token goes through, perhaps weighed by a sigmoid of its own."""

    def __init__(self, sizes: ModelConfig, config: MoEConfig, size: int) -> None:
        super().__init__(replace(sizes, ffn_size=size), MLPConfig(activation=config.activation))
        self.router = Linear({"embed": sizes.hidden_size}, {"router": 1}) if config.shared_gate else None

    def __call__(self, x_RTD: Array, context: BlockContext) -> tuple[Array, Aux]:
        y, terms = super().__call__(x_RTD, context)
        if self.router is None:
            return y, terms
        return y * jax.nn.sigmoid(self.router(x_RTD, context.products)), terms


class MoE(nnx.Module):
    """A router and its experts, and perhaps a feed-forward beside them that every token goes through."""

    def __init__(self, sizes: ModelConfig, config: MoEConfig) -> None:
        self.router = Router(sizes, config)
        self.experts = Experts(sizes, config)
        self.num_layers = len(sizes.routed_layers)
        self.shared = SharedExpert(sizes, config, config.shared_size) if config.shared_size else None
        self.config = config

    def __call__(self, x_RTD: Array, context: BlockContext) -> tuple[Array, Aux]:
        logits = self.router(x_RTD, context.products)
        ids = context.route_fn(self.router.choose(logits))
        weights = self.router.weigh(logits, ids)
        ids = jnp.where(context.is_token[..., None], ids, self.config.num_experts)
        y = self.experts(Routed(x_RTD, ids, weights), context.products)
        if self.shared is not None:
            y = y + self.shared(x_RTD, context)[0]
        return y, {} if context.layer_number is None else self._measure(logits, ids, context)

    @staticmethod
    def list_terms(config: MoEConfig) -> dict[str, float]:
        """Returns the names of what a layer gives as `Aux`, see `MLP.list_terms`."""
        return {"balance_loss": config.balance_coef, "router_z_loss": 0.0, "router_entropy": 0.0, "expert_load": 0.0}

    def _measure(self, logits: Array, ids: Array, context: BlockContext) -> Aux:
        probs, add = self.router.share(logits), partial(_sum_tokens, is_token=context.is_token)
        counts = jnp.sum(ids[..., None] == jnp.arange(self.config.num_experts), axis=-2, dtype=jnp.float32)
        load = jnp.zeros((self.num_layers, self.config.num_experts), jnp.float32)
        return {
            "balance_loss": add(measure_balance(probs, counts, context.segment_ids)),
            "router_z_loss": add(jnp.square(jax.nn.logsumexp(logits, axis=-1))),
            "router_entropy": add(-jnp.sum(probs * jnp.log(jnp.maximum(probs, 1e-30)), axis=-1)),
            "expert_load": load.at[context.layer_number].set(counts.sum(axis=(0, 1)), mode="drop"),
        }


def measure_balance(probs: Array, counts: Array, segment_ids: Array) -> Array:
    """Returns for each token `[R, T]` E times the sum over experts of their load in its sequence, which is a share of
    its tokens, times the token's own `probs` `[R, T, E]`; `counts` are 1 where a token has the expert.

    The mean over tokens is that of sequences of E * sum(f * P), the loss of Switch (arXiv:2101.03961), as DeepSeek-V3
    has it by sequence (arXiv:2412.19437): it does not depend on how a batch is packed or split. It is k where all
    experts have the same load.
    """
    num_segments = segment_ids.shape[1]
    tokens = jnp.ones((*segment_ids.shape, 1), jnp.float32)
    sums = sum_by_segment(jnp.concatenate([counts, tokens], axis=-1), segment_ids, num_segments)
    load = sums[..., :-1] / jnp.maximum(sums[..., -1:], 1)
    of_own = jnp.take_along_axis(load, jnp.maximum(segment_ids - 1, 0)[..., None], axis=1)
    return probs.shape[-1] * jnp.sum(probs * of_own, axis=-1)


def _sum_tokens(values: Array, is_token: Array) -> Array:
    return jnp.sum(jnp.where(is_token, values, 0))
