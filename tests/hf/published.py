"""Tables of rules for public architectures that have no family yet, and how transformers makes a tiny one of each."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from realjax.hf.families import gemma, gemma2, glm4_moe, gpt2, gpt_oss, granitemoe, olmoe
from realjax.hf.families.moe_like import EXPERTS, list_experts
from realjax.hf.families.tables import LAYER, RULES, change, fuse
from realjax.hf.pieces import LayerNumbers
from realjax.hf.rules import LAYERS, Rule

# E experts of M hidden numbers each, S of an expert that takes every token, P positions.
LETTERS = {"V": 64, "D": 32, "F": 48, "N": 4, "K": 2, "G": 2, "H": 8, "E": 3, "M": 24, "S": 40, "P": 64}
ALIKE: LayerNumbers = {LAYERS: (0, 1, 2, 3)}
ALTERNATING: LayerNumbers = {f"{LAYERS}/even": (0, 2), f"{LAYERS}/odd": (1, 3)}
LAST_APART: LayerNumbers = {f"{LAYERS}/sliding": (0, 1, 2), f"{LAYERS}/full": (3,)}
FIRST_APART: LayerNumbers = {f"{LAYERS}/dense": (0,), f"{LAYERS}/sparse": (1, 2, 3)}


@dataclass(frozen=True, kw_only=True)
class Published:
    """One architecture: transformers' config and class of a tiny model, and the rules of its tensors."""

    name: str  # of transformers' classes
    rules: tuple[Rule, ...] = RULES
    config: Mapping[str, object] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)  # that are not in LETTERS
    layer_numbers: LayerNumbers = field(default_factory=lambda: ALIKE)
    class_names: tuple[str, str] | None = None

    @property
    def classes(self) -> tuple[str, str]:
        """The names of transformers' config and model."""
        return self.class_names or (f"{self.name}Config", f"{self.name}ForCausalLM")


def list_shared(name: str, ffn: str) -> tuple[Rule, ...]:
    """Returns the rules of an expert that takes every token."""
    return (
        Rule("layers/mlp/shared/gate/kernel", f"{LAYER}{name}.gate_proj.weight", f"{ffn} D -> D {ffn}"),
        Rule("layers/mlp/shared/up/kernel", f"{LAYER}{name}.up_proj.weight", f"{ffn} D -> D {ffn}"),
        Rule("layers/mlp/shared/down/kernel", f"{LAYER}{name}.down_proj.weight", f"D {ffn} -> {ffn} D"),
    )


def list_norms(layer: str, names: Mapping[str, str]) -> tuple[Rule, ...]:
    """Returns the rules of layer norms, with scale and bias."""
    kinds = {"scale": "weight", "bias": "bias"}
    return tuple(
        Rule(f"{path}/{ours}", f"{layer}{name}.{theirs}", "D -> D")
        for path, name in names.items()
        for ours, theirs in kinds.items()
    )


MOE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
QK_NORMS = (
    Rule("layers/attn/q_norm/scale", LAYER + "self_attn.q_norm.weight", "(N H) -> N H"),
    Rule("layers/attn/k_norm/scale", LAYER + "self_attn.k_norm.weight", "(K H) -> K H"),
)
NORMS_AFTER = (
    Rule("layers/attn_post_norm/scale", LAYER + "post_attention_layernorm.weight", "D -> D"),
    Rule("layers/mlp_post_norm/scale", LAYER + "post_feedforward_layernorm.weight", "D -> D"),
)
PHI3_RULES = change(
    *fuse(
        LAYER + "self_attn.qkv_proj.weight",
        {
            "layers/attn/q/kernel": "(([N] + K + K) H) D -> D N H",
            "layers/attn/k/kernel": "((N + [K] + K) H) D -> D K H",
            "layers/attn/v/kernel": "((N + K + [K]) H) D -> D K H",
        },
    ),
    *fuse(
        LAYER + "mlp.gate_up_proj.weight",
        {"layers/mlp/gate/kernel": "([F] + F) D -> D F", "layers/mlp/up/kernel": "(F + [F]) D -> D F"},
    ),
)
NEOX_LAYER = "gpt_neox.layers.{layer}."
NEOX_RULES = (
    Rule("embed/table", "gpt_neox.embed_in.weight", "V D -> V D"),
    *list_norms(NEOX_LAYER, {"layers/attn_norm": "input_layernorm", "layers/mlp_norm": "post_attention_layernorm"}),
    *fuse(
        NEOX_LAYER + "attention.query_key_value.weight",
        {
            "layers/attn/q/kernel": "(N ([1] + 1 + 1) H) D -> D N H",
            "layers/attn/k/kernel": "(N (1 + [1] + 1) H) D -> D N H",
            "layers/attn/v/kernel": "(N (1 + 1 + [1]) H) D -> D N H",
        },
    ),
    *fuse(
        NEOX_LAYER + "attention.query_key_value.bias",
        {
            "layers/attn/q/bias": "(N ([1] + 1 + 1) H) -> N H",
            "layers/attn/k/bias": "(N (1 + [1] + 1) H) -> N H",
            "layers/attn/v/bias": "(N (1 + 1 + [1]) H) -> N H",
        },
    ),
    Rule("layers/attn/o/kernel", NEOX_LAYER + "attention.dense.weight", "D (N H) -> N H D"),
    Rule("layers/attn/o/bias", NEOX_LAYER + "attention.dense.bias", "D -> D"),
    Rule("layers/mlp/up/kernel", NEOX_LAYER + "mlp.dense_h_to_4h.weight", "F D -> D F"),
    Rule("layers/mlp/up/bias", NEOX_LAYER + "mlp.dense_h_to_4h.bias", "F -> F"),
    Rule("layers/mlp/down/kernel", NEOX_LAYER + "mlp.dense_4h_to_h.weight", "D F -> F D"),
    Rule("layers/mlp/down/bias", NEOX_LAYER + "mlp.dense_4h_to_h.bias", "D -> D"),
    *list_norms("", {"norm": "gpt_neox.final_layer_norm"}),
    Rule("head/kernel", "embed_out.weight", "V D -> D V"),
)
FALCON_LAYER = "transformer.h.{layer}."
FALCON_RULES = (
    Rule("embed/table", "transformer.word_embeddings.weight", "V D -> V D"),
    *list_norms(FALCON_LAYER, {"layers/attn_norm": "ln_attn", "layers/mlp_norm": "ln_mlp"}),
    *fuse(
        FALCON_LAYER + "self_attention.query_key_value.weight",
        {
            "layers/attn/q/kernel": "(K ([G] + 1 + 1) H) D -> D (K G) H",
            "layers/attn/k/kernel": "(K (G + [1] + 1) H) D -> D K H",
            "layers/attn/v/kernel": "(K (G + 1 + [1]) H) D -> D K H",
        },
    ),
    Rule("layers/attn/o/kernel", FALCON_LAYER + "self_attention.dense.weight", "D (N H) -> N H D"),
    Rule("layers/mlp/up/kernel", FALCON_LAYER + "mlp.dense_h_to_4h.weight", "F D -> D F"),
    Rule("layers/mlp/down/kernel", FALCON_LAYER + "mlp.dense_4h_to_h.weight", "D F -> F D"),
    *list_norms("", {"norm": "transformer.ln_f"}),
    Rule("head/kernel", "lm_head.weight", "V D -> D V"),
)

WIDE = {"head_dim": 16}  # the heads together are wider than the model
PUBLISHED = {
    "mistral": Published(name="Mistral", config=WIDE, sizes={"H": 16}),
    "ministral3": Published(name="Ministral3", config=WIDE, sizes={"H": 16}),
    "granite": Published(name="Granite"),
    "smollm3": Published(
        name="SmolLM3",
        config={"no_rope_layers": [1, 0, 1, 0], "tie_word_embeddings": True},
        layer_numbers=ALTERNATING,
    ),
    "gemma": Published(name="Gemma", rules=gemma.RULES, config=WIDE, sizes={"H": 16}),
    "gemma2": Published(name="Gemma2", rules=gemma2.RULES, config=WIDE, sizes={"H": 16}, layer_numbers=ALTERNATING),
    "gemma3": Published(
        name="Gemma3",
        class_names=("Gemma3TextConfig", "Gemma3ForCausalLM"),
        rules=gemma2.RULES,
        config={**WIDE, "sliding_window_pattern": 2},
        sizes={"H": 16},
        layer_numbers=ALTERNATING,
    ),
    "olmo2": Published(name="Olmo2", rules=change(*NORMS_AFTER, *QK_NORMS)),
    "olmo3": Published(name="Olmo3", rules=change(*NORMS_AFTER, *QK_NORMS), layer_numbers=LAST_APART),
    "phi3": Published(name="Phi3", rules=PHI3_RULES),
    "gpt2": Published(
        name="GPT2",
        class_names=("GPT2Config", "GPT2LMHeadModel"),
        rules=gpt2.RULES,
        config={"n_inner": 48},
        sizes={"K": 4, "G": 1},
    ),
    "gpt_neox": Published(name="GPTNeoX", rules=NEOX_RULES),
    "falcon": Published(
        name="Falcon",
        rules=FALCON_RULES,
        config={"num_kv_heads": 2, "new_decoder_architecture": True, "ffn_hidden_size": 48},
    ),
    "mixtral": Published(
        name="Mixtral",
        rules=change(*list_experts("block_sparse_moe", "w1", "w3", "w2")),
        config={"num_local_experts": 3},
        sizes={"M": 48},
    ),
    "qwen2_moe": Published(
        name="Qwen2Moe",
        rules=change(
            *EXPERTS,
            *list_shared("mlp.shared_expert", "S"),
            Rule("layers/mlp/shared/router/kernel", LAYER + "mlp.shared_expert_gate.weight", "1 D -> D 1"),
        ),
        config={**MOE, "shared_expert_intermediate_size": 40},
    ),
    "qwen3_moe": Published(name="Qwen3Moe", rules=change(*EXPERTS), config={**MOE, **WIDE}, sizes={"H": 16}),
    "qwen3_moe-sparse": Published(
        name="Qwen3Moe",
        rules=change(*EXPERTS),
        config={**MOE, "head_dim": 8, "decoder_sparse_step": 2},
        layer_numbers=ALTERNATING,
    ),
    "olmoe": Published(
        name="Olmoe",
        rules=olmoe.RULES,
        config={"num_experts": 3, "num_experts_per_tok": 2},
        sizes={"M": 48},
    ),
    "glm4_moe": Published(
        name="Glm4Moe",
        rules=glm4_moe.RULES,
        sizes={"S": 24},
        config={**MOE, "n_routed_experts": 3, "first_k_dense_replace": 1, "use_qk_norm": True, "head_dim": 8},
        layer_numbers=FIRST_APART,
    ),
    "granitemoe": Published(
        name="GraniteMoe",
        rules=granitemoe.RULES,
        config={"num_local_experts": 3, "num_experts_per_tok": 2},
        sizes={"M": 48},
    ),
    "gpt_oss": Published(
        name="GptOss",
        rules=gpt_oss.RULES,
        config={"num_local_experts": 3, **WIDE},
        sizes={"H": 16, "M": 48},
        layer_numbers=ALTERNATING,
    ),
}
