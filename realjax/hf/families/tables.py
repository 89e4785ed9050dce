"""Tables of rules: where the leaves of a Llama-like decoder lie in its checkpoints, and how to say what differs.

Biases and norms of q and k stand here once for all families: a rule is used only where the model has the leaf.
"""

from collections.abc import Mapping

from realjax.hf.rules import Rule

LAYER = "model.layers.{layer}."

RULES = (
    Rule("embed/table", "model.embed_tokens.weight", "V D -> V D"),
    Rule("layers/attn_norm/scale", LAYER + "input_layernorm.weight", "D -> D"),
    Rule("layers/attn/q/kernel", LAYER + "self_attn.q_proj.weight", "(N H) D -> D N H"),
    Rule("layers/attn/k/kernel", LAYER + "self_attn.k_proj.weight", "(K H) D -> D K H"),
    Rule("layers/attn/v/kernel", LAYER + "self_attn.v_proj.weight", "(K H) D -> D K H"),
    Rule("layers/attn/q/bias", LAYER + "self_attn.q_proj.bias", "(N H) -> N H"),
    Rule("layers/attn/k/bias", LAYER + "self_attn.k_proj.bias", "(K H) -> K H"),
    Rule("layers/attn/v/bias", LAYER + "self_attn.v_proj.bias", "(K H) -> K H"),
    Rule("layers/attn/q_norm/scale", LAYER + "self_attn.q_norm.weight", "H -> H"),
    Rule("layers/attn/k_norm/scale", LAYER + "self_attn.k_norm.weight", "H -> H"),
    Rule("layers/attn/o/kernel", LAYER + "self_attn.o_proj.weight", "D (N H) -> N H D"),
    Rule("layers/attn/o/bias", LAYER + "self_attn.o_proj.bias", "D -> D"),
    Rule("layers/mlp_norm/scale", LAYER + "post_attention_layernorm.weight", "D -> D"),
    Rule("layers/mlp/gate/kernel", LAYER + "mlp.gate_proj.weight", "F D -> D F"),
    Rule("layers/mlp/up/kernel", LAYER + "mlp.up_proj.weight", "F D -> D F"),
    Rule("layers/mlp/down/kernel", LAYER + "mlp.down_proj.weight", "D F -> F D"),
    Rule("layers/mlp/gate/bias", LAYER + "mlp.gate_proj.bias", "F -> F"),
    Rule("layers/mlp/up/bias", LAYER + "mlp.up_proj.bias", "F -> F"),
    Rule("layers/mlp/down/bias", LAYER + "mlp.down_proj.bias", "D -> D"),
    Rule("norm/scale", "model.norm.weight", "D -> D"),
    Rule("head/kernel", "lm_head.weight", "V D -> D V"),
)


def change(*rules: Rule) -> tuple[Rule, ...]:
    """Returns `RULES` with these, in the place of those that have one of their leaves or tensors."""
    taken = {rule.path for rule in rules} | {rule.name for rule in rules}
    kept = [rule for rule in RULES if not {rule.path, rule.name} & taken]
    end = next(i for i, rule in enumerate(kept) if rule.path == "norm/scale")
    return (*kept[:end], *rules, *kept[end:])


def fuse(name: str, leaves: Mapping[str, str]) -> tuple[Rule, ...]:
    """Returns the rules of leaves that are parts of one tensor: their paths and dims."""
    return tuple(Rule(path, name, dims) for path, dims in leaves.items())
