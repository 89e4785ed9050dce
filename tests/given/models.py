"""Tiny models in memory: configs of each family, parameters, layouts, and quick ways to compile."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from realjax.core.axes import Rules, optimizer_rules, tree_shardings
from realjax.core.layout import Layout, ParallelStrategy
from realjax.core.trees import Tree, map_paths
from realjax.engine.attention.cases import Case
from realjax.engine.attention.choose import KERNELS
from realjax.hf.families import config_from_hf
from realjax.models.build import Model, build_model
from realjax.models.config import AttentionConfig, LayerKind, MLPConfig, ModelConfig, NormConfig, RopeConfig

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
# As families with experts call them.
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SHARED = {"shared_expert_intermediate_size": 40}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
# Three pairs of dims, of heads of 8 of which six turn.
LONG_ROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.2, 1.5], "long_factor": [1.0, 2.5, 6.0]}
GRANITE = {"embedding_multiplier": 6.0, "attention_multiplier": 0.2, "residual_multiplier": 0.3, "logits_scaling": 4.0}
GLM = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "routed_scaling_factor": 1.5}
FOUR = {"num_hidden_layers": 4}  # also where two are enough for most families
# What is tested of every family, a line for each configuration: transformers' `model_type`, and keys beside `SIZES`.
# Windows of 8 tokens and rotary embeddings of 32 positions or less: the tests' sequences are longer.
CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
GEMMA = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24}
TIMES_8 = {"rope_type": "linear", "factor": 8.0}
THIRDS = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "dynamic-rope": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "granite": ("granite", GRANITE),
    "granite-ones": ("granite", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 8, "head_dim": 16}),
    "mistral-whole": ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "ministral3": (
        "ministral3",
        {"rope_parameters": {**YARN_ROPE, "original_max_position_embeddings": 64, "llama_4_scaling_beta": 0.1}},
    ),
    "olmo2": ("olmo2", {}),
    "olmo2-yarn": ("olmo2", {"attention_bias": True, "rope_parameters": YARN_ROPE, "tie_word_embeddings": True}),
    "olmo3": ("olmo3", {**FOUR, "sliding_window": 8, "rope_scaling": YARN_ROPE}),
    "olmo3-whole": ("olmo3", {**FOUR, "sliding_window": 8, "layer_types": ["full_attention"] * 4}),
    "phi3": ("phi3", {"partial_rotary_factor": 0.5, "sliding_window": 8}),
    "phi3-short": (
        "phi3",
        {"rope_scaling": {**LONG_ROPE, "attention_factor": 1.2}, "partial_rotary_factor": 0.75}
        | {"original_max_position_embeddings": 64},
    ),
    "phi3-long": (
        "phi3",
        {"rope_scaling": LONG_ROPE, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 4},
    ),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
    "qwen2-windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": {**YARN_ROPE, "truncate": False, "beta_fast": 16.0}}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-biases": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "qwen3-yarn": ("qwen3", {"head_dim": 16, "rope_parameters": {**YARN_ROPE, "mscale": 1.0, "mscale_all_dim": 0.7}}),
    "smollm3": ("smollm3", FOUR),
    "smollm3-untied": ("smollm3", {**FOUR, "no_rope_layers": [0, 1, 0, 1], "tie_word_embeddings": False}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen2_moe": ("qwen2_moe", {**EXPERTS, **SHARED, "mlp_only_layers": [0]}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "head_dim": 16, "norm_topk_prob": True}),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 8}),
    "glm4_moe": ("glm4_moe", {**GLM, "head_dim": 16, "use_qk_norm": True, "n_group": 4, "topk_group": 2}),
    "glm4_moe-biases": (
        "glm4_moe",
        {**GLM, "attention_bias": True, "first_k_dense_replace": 2, "n_shared_experts": 2, "norm_topk_prob": False}
        | {"partial_rotary_factor": 1.0, "head_dim": 8, "tie_word_embeddings": True},
    ),
    "granitemoe": ("granitemoe", {**GRANITE, "num_local_experts": 4}),
    "granitemoe-ones": ("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 3, "attention_bias": True}),
    "qwen3_moe-sparse": ("qwen3_moe", {**EXPERTS, "head_dim": 16, "decoder_sparse_step": 2}),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma-untied": ("gemma", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": False}),
    "gemma2": ("gemma2", {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma2-uncapped": (
        "gemma2",
        {**FOUR, "head_dim": 16, **dict.fromkeys(CAPS), "layer_types": ["full_attention"] * 4},
    ),
    "gemma3": ("gemma3_text", {**GEMMA, **FOUR, "layer_types": THIRDS, "rope_scaling": TIMES_8}),
    "gemma3-sliding": ("gemma3_text", {**GEMMA, "final_logit_softcapping": 3.0, "tie_word_embeddings": False}),
    "gpt2": ("gpt2", {}),
    "gpt2-untied": (
        "gpt2",
        {"n_inner": 48, "activation_function": "gelu", "scale_attn_weights": False, "tie_word_embeddings": False},
    ),
}
# The first of each family, for what one configuration shows.
FIRST_KINDS = tuple({model_type: kind for kind, (model_type, _) in reversed(KINDS.items())}.values())[::-1]
# Of each family as transformers has it by default, but for the sizes.
OF_EXPERTS = {"num_local_experts", "n_routed_experts", *EXPERTS, *SHARED}
FAMILY_CONFIGS = {
    name: config_from_hf(
        {"model_type": name, **SIZES, **{key: x for key, x in KINDS[kind][1].items() if key in OF_EXPERTS}}, name
    )
    for name, kind in zip((KINDS[kind][0] for kind in FIRST_KINDS), FIRST_KINDS)
}
# Packed rows of tiny models on CPUs, as attention kernels see them.
CASE = Case(use="rows", platform="cpu", dtype="float32", head_dim=4)
# The attention kernels that run on any device.
PORTABLE_KERNELS = tuple(name for name, kernel in KERNELS.items() if kernel.find_fault(CASE) is None)
# Every leaf a family can have: norms and biases everywhere, a head of its own.
FULL = {"qkv_bias": True, "o_bias": True, "bias": True, "qk_norm": NormConfig(), "sinks": True}
# As in GPT-2: learned positions, layer norms, a feed-forward without a gate. With a norm of k, for without one or a
# rotation its bias has no effect: softmax does not see what all scores have in common.
_LAYER_NORM = NormConfig(kind="layer")
_PLAIN = LayerKind(
    mixer=AttentionConfig(rope=None, qkv_bias=True, o_bias=True, qk_norm=NormConfig()),
    feed_forward=MLPConfig(activation="gelu_tanh", gated=False, bias=True),
    attn_norm=_LAYER_NORM,
    mlp_norm=_LAYER_NORM,
)
LEARNED = {"pattern": (_PLAIN,), "norm": _LAYER_NORM, "learned_positions": True, "num_kv_heads": 8}
# As in Gemma 2 and 3: softcaps, norms of 1 + w on all sides, every second layer a window and its own rotation.
_ONE_PLUS = NormConfig(one_plus=True)
_NORMS = dict.fromkeys(("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm"), _ONE_PLUS)
_SLIDING = LayerKind(
    name="sliding",
    mixer=AttentionConfig(window=5, softcap=2.0, scale=0.4, rope=RopeConfig(theta=1e2), qk_norm=_ONE_PLUS),
    feed_forward=MLPConfig(activation="gelu_tanh"),
    **_NORMS,
)
_FULL = LayerKind(mixer=AttentionConfig(softcap=2.0, scale=0.4), feed_forward=_SLIDING.feed_forward, **_NORMS)
CAPPED = {
    "pattern": (_SLIDING, _FULL),
    "norm": _ONE_PLUS,
    "embed_scale": 32**0.5,
    "logit_softcap": 3.0,
    "tied": True,
}


def make_model(**changes) -> Model:
    """Returns a two-layer model with eight query and two key-value heads.

    `changes` are fields of ModelConfig, or of the mixer and the feed-forward of its one kind of layer.
    """
    sizes = {
        "family": "llama",
        "vocab_size": 96,
        "hidden_size": 32,
        "num_layers": 2,
        "num_q_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 4,
        "ffn_size": 48,
        "max_positions": 128,
    }
    take = lambda kind: {name: changes.pop(name) for name in kind.__dataclass_fields__ if name in changes}
    mixer, feed_forward = AttentionConfig(**take(AttentionConfig)), MLPConfig(**take(MLPConfig))
    kind = LayerKind(mixer=mixer, feed_forward=feed_forward)
    return build_model(ModelConfig(**{**sizes, "pattern": (kind,), **changes}))


def make_layout(dp: int = 1, tp: int = 1, pp: int = 1, sp: bool = False, zero: int = 0, ep: int = 1) -> Layout:
    """Returns the layout of this strategy on the first devices."""
    return Layout.of(ParallelStrategy(dp=dp, tp=tp, pp=pp, sequence_parallel=sp, zero_stage=zero, ep=ep))


def random_tree(model: Model, seed: int = 0, scale: float = 0.2) -> Tree:
    """Returns host parameters of which no leaf is special: biases are not 0, norms not 1."""

    def draw(path: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        rng = np.random.default_rng([seed, *path.encode()])
        return (rng.standard_normal(leaf.shape) * scale + path.endswith("scale")).astype(np.float32)

    return map_paths(draw, model.abstract)


def with_empty_layers(model: Model, num_empty: int) -> Model:
    """Returns the same model with empty layers at the end of its stack."""
    return build_model(replace(model.config, num_empty_layers=num_empty))


def fill_up(params: Tree, num_empty: int) -> Tree:
    """Returns host parameters (or anything of their shapes) with zeros for empty layers."""
    return {
        **params,
        "layers": jax.tree.map(lambda x: np.pad(x, [(0, num_empty)] + [(0, 0)] * (x.ndim - 1)), params["layers"]),
    }


def cut_empty(model: Model, params: Tree) -> tuple[Tree, list[np.ndarray]]:
    """Returns the parameters without empty layers, and the leaves of those."""
    num_layers, layers = model.config.num_layers, params["layers"]
    real = {**params, "layers": jax.tree.map(lambda x: np.asarray(x)[:num_layers], layers)}
    return real, [np.asarray(x)[num_layers:] for x in jax.tree.leaves(layers)]


def place_params(model: Model, params: Tree, layout: Layout, rules: Rules | None = None) -> Tree:
    """Returns the parameters on the layout's devices, by default where the optimizer keeps its master copy."""
    rules = optimizer_rules(layout.strategy) if rules is None else rules
    return jax.device_put(params, tree_shardings(model.axes, model.abstract, rules, layout))


def on_one_device(model: Model) -> dict:
    """Returns shardings that put every parameter on the first device."""
    return jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), model.abstract)


def quick_jit(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Returns `jax.jit(fn)` without LLVM's optimisations: half the time to compile, and tiny models run once."""
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0}, **options)


@contextmanager
def quick_compiles() -> Iterator[None]:
    """Compiles without most of XLA's optimisations: tiny programs that run a few times."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
