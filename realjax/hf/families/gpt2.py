"""GPT-2: learned positions, layer norms, a plain feed-forward, and kernels that lie as they multiply, `[in, out]`."""

from realjax.core.json_text import JsonObject
from realjax.hf.families.llama_like import read_activation
from realjax.hf.rules import Family, Rule
from realjax.models.config import AttentionConfig, LayerKind, MLPConfig, ModelConfig, NormConfig

_LAYER = "transformer.h.{layer}."
_NORMS = {"layers/attn_norm": _LAYER + "ln_1", "layers/mlp_norm": _LAYER + "ln_2", "norm": "transformer.ln_f"}
_PLACES = {"q": "[N] + N + N", "k": "N + [N] + N", "v": "N + N + [N]"}  # in one tensor, one after another
_PRODUCTS = {
    "attn/o": ("attn.c_proj", "(N H) D -> N H D", "D -> D"),
    "mlp/up": ("mlp.c_fc", "D F -> D F", "F -> F"),
    "mlp/down": ("mlp.c_proj", "F D -> F D", "D -> D"),
    **{
        f"attn/{x}": ("attn.c_attn", f"D (({heads}) H) -> D N H", f"(({heads}) H) -> N H")
        for x, heads in _PLACES.items()
    },
}
RULES = (
    Rule("embed/table", "transformer.wte.weight", "V D -> V D"),
    Rule("positions/table", "transformer.wpe.weight", "P D -> P D"),
    *(Rule(f"{path}/scale", f"{name}.weight", "D -> D") for path, name in _NORMS.items()),
    *(Rule(f"{path}/bias", f"{name}.bias", "D -> D") for path, name in _NORMS.items()),
    *(Rule(f"layers/{path}/kernel", f"{_LAYER}{name}.weight", dims) for path, (name, dims, _) in _PRODUCTS.items()),
    *(Rule(f"layers/{path}/bias", f"{_LAYER}{name}.bias", dims) for path, (name, _, dims) in _PRODUCTS.items()),
    Rule("head/kernel", "lm_head.weight", "V D -> D V"),
)
_REFUSED = ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention")


def _config_from_hf(hf: JsonObject, is_critic: bool) -> ModelConfig:
    if found := [key for key in _REFUSED if hf.get(key)]:
        raise ValueError(f"{found[0]} is true, which is not computed; the published GPT-2 models have false")
    size = lambda own, other: hf[own] if own in hf or other not in hf else hf[other]  # transformers takes both
    D, N = size("n_embd", "hidden_size"), size("n_head", "num_attention_heads")
    norm, scale = NormConfig(kind="layer", eps=hf["layer_norm_epsilon"]), None if hf["scale_attn_weights"] else 1.0
    activation = read_activation(hf["activation_function"], "activation_function")
    mixer = AttentionConfig(rope=None, qkv_bias=True, o_bias=True, scale=scale)
    feed_forward = MLPConfig(activation=activation, gated=False, bias=True)
    return ModelConfig(
        family="gpt2",
        vocab_size=hf["vocab_size"],
        hidden_size=D,
        num_layers=size("n_layer", "num_hidden_layers"),
        num_q_heads=N,
        num_kv_heads=N,
        head_dim=D // N,
        ffn_size=hf.get("n_inner") or 4 * D,
        max_positions=size("n_positions", "max_position_embeddings"),
        pattern=(LayerKind(mixer=mixer, feed_forward=feed_forward, attn_norm=norm, mlp_norm=norm),),
        norm=norm,
        tied=hf["tie_word_embeddings"] and not is_critic,
        learned_positions=True,
        is_critic=is_critic,
    )


def _config_to_hf(config: ModelConfig) -> JsonObject:
    (kind,) = config.pattern
    activation, is_scaled, F = kind.feed_forward.activation, kind.mixer.scale is None, config.ffn_size
    sizes = {"n_embd": config.hidden_size, "n_layer": config.num_layers, "n_head": config.num_q_heads}
    sizes |= {"n_inner": F if 4 * config.hidden_size != F else None, "n_positions": config.max_positions}
    named = {"activation_function": {"gelu_tanh": "gelu_new"}.get(activation, activation)}
    switches = {"scale_attn_weights": is_scaled, "tie_word_embeddings": config.tied}
    return {"vocab_size": config.vocab_size, **sizes, **named, **switches, "layer_norm_epsilon": config.norm.eps}


FAMILY = Family(
    name="gpt2",
    published_as=("gpt2",),
    causal_class="GPT2LMHeadModel",
    critic_class="GPT2ForSequenceClassification",
    rules=RULES,
    spellings={name: f"transformer.{name}" for name in ("wte.", "wpe.", "h.", "ln_f.")},
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    defaults={"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True}
    | {"tie_word_embeddings": True},
)
