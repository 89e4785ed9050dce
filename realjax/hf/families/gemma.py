"""Gemma: embedded tokens are scaled, norms multiply by 1 + what is learned, the head is the embedding table."""

from dataclasses import replace

from realjax.core.json_text import JsonObject
from realjax.hf.families.llama_like import read_activation, read_norm, read_sizes, write_sizes
from realjax.hf.families.rope import read_rope
from realjax.hf.families.tables import RULES as LLAMA_RULES
from realjax.hf.rules import Family, Rule
from realjax.models.config import AttentionConfig, LayerKind, MLPConfig, ModelConfig


def learn_less_one(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Returns the rules with every norm's scale as what is learned of it: in 16 bits (1 + w) - 1 is not w."""
    return tuple(replace(rule, path=rule.path.replace("norm/scale", "norm/scale_less_one")) for rule in rules)


RULES = learn_less_one(LLAMA_RULES)
DEFAULTS: JsonObject = {
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}


def read_model(hf: JsonObject, is_critic: bool) -> JsonObject:
    """Returns the `ModelConfig` fields that all Gemmas spell alike. Raises ValueError for one that looks ahead."""
    if hf.get("use_bidirectional_attention"):
        raise ValueError("use_bidirectional_attention is true; only models whose tokens see no later ones are trained")
    sizes = read_sizes(hf, is_critic)
    scale, positions = sizes["hidden_size"] ** 0.5, hf["max_position_embeddings"]
    return sizes | {"norm": replace(read_norm(hf), one_plus=True), "embed_scale": scale, "max_positions": positions}


def read_kind(hf: JsonObject, **mixer: object) -> LayerKind:
    """Returns a layer with norms in front of its two parts; `mixer` are fields of its attention."""
    norm, bias = replace(read_norm(hf), one_plus=True), hf.get("attention_bias", False)
    old, new = hf["hidden_act"], hf.get("hidden_activation")  # releases of transformers read one or the other
    return LayerKind(
        mixer=replace(AttentionConfig(qkv_bias=bias, o_bias=bias), **mixer),
        feed_forward=MLPConfig(activation=read_activation(new or old)),
        attn_norm=norm,
        mlp_norm=norm,
    )


def _config_from_hf(hf: JsonObject, is_critic: bool) -> ModelConfig:
    kind = read_kind(hf, rope=read_rope(hf))
    if kind.feed_forward.activation == "gelu":  # the first releases say so, and mean its approximation
        kind = replace(kind, feed_forward=MLPConfig(activation="gelu_tanh"))
    return ModelConfig(family="gemma", **read_model(hf, is_critic), pattern=(kind,))


def _config_to_hf(config: ModelConfig) -> JsonObject:
    return write_sizes(config) | {"attention_bias": config.pattern[0].mixer.qkv_bias}


FAMILY = Family(
    name="gemma",
    published_as=("gemma",),
    causal_class="GemmaForCausalLM",
    critic_class="GemmaForSequenceClassification",
    rules=RULES,
    defaults=DEFAULTS,
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
)
