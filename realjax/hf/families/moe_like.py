"""What families with experts share: the tensors of experts and routers, and which layers have them."""

from collections.abc import Sequence
from dataclasses import replace

from realjax.core.json_text import JsonObject
from realjax.hf.families.llama_like import find_period
from realjax.hf.rules import Rule
from realjax.models.config import LayerKind, MLPConfig, ModelConfig, MoEConfig

_LAYER = "model.layers.{layer}."


def list_experts(moe: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """Returns the rules of a router and of experts that have a tensor each."""
    expert = f"{_LAYER}{moe}.experts.{{expert}}."
    return (
        Rule("layers/mlp/router/kernel", f"{_LAYER}{moe}.gate.weight", "E D -> D E"),
        Rule("layers/mlp/experts/gate/kernel", f"{expert}{gate}.weight", "M D -> E D M"),
        Rule("layers/mlp/experts/up/kernel", f"{expert}{up}.weight", "M D -> E D M"),
        Rule("layers/mlp/experts/down/kernel", f"{expert}{down}.weight", "D M -> E M D"),
    )


def list_shared(name: str) -> tuple[Rule, ...]:
    """Returns the rules of a feed-forward beside the experts."""
    return (
        Rule("layers/mlp/shared/gate/kernel", f"{_LAYER}{name}.gate_proj.weight", "S D -> D S"),
        Rule("layers/mlp/shared/up/kernel", f"{_LAYER}{name}.up_proj.weight", "S D -> D S"),
        Rule("layers/mlp/shared/down/kernel", f"{_LAYER}{name}.down_proj.weight", "D S -> S D"),
    )


EXPERTS = list_experts("mlp", "gate_proj", "up_proj", "down_proj")


def count_experts(hf: JsonObject) -> int:
    """Returns the number of experts; transformers 4 and 5 call it differently. Raises KeyError for neither."""
    counts = [hf.get("num_experts"), hf.get("num_local_experts")]
    return hf["num_local_experts"] if counts[0] is None else counts[0]


def spread_experts(
    num_layers: int, pattern: Sequence[LayerKind], experts: MoEConfig, is_sparse: Sequence[bool]
) -> tuple[LayerKind, ...]:
    """Returns the pattern with experts in those layers that are sparse; the others, if any, have names of their own."""
    dense = lambda kind: replace(kind, name="dense" if kind.name == "full" else f"dense_{kind.name}")
    kinds = [pattern[i % len(pattern)] for i in range(num_layers)]
    kinds = [
        replace(kind, feed_forward=experts) if sparse else dense(kind)
        for kind, sparse in zip(kinds, is_sparse, strict=True)
    ]
    return tuple(kinds[: find_period(kinds)])


def read_sparse_layers(hf: JsonObject) -> list[bool]:
    """Returns for each layer whether it has experts, as Qwen's config.json says."""
    only, step = hf.get("mlp_only_layers") or [], hf.get("decoder_sparse_step", 1)
    return [i not in only and (i + 1) % step == 0 for i in range(hf["num_hidden_layers"])]


def write_sparse_layers(config: ModelConfig) -> JsonObject:
    """Returns the config.json keys of `read_sparse_layers`; its inverse."""
    num_layers = config.num_layers
    dense = [i for i, kind in enumerate(config.layers) if isinstance(kind.feed_forward, MLPConfig)]
    for step in range(1, num_layers + 1):
        if dense == [i for i in range(num_layers) if (i + 1) % step]:
            return {"mlp_only_layers": [], "decoder_sparse_step": step}
    return {"mlp_only_layers": dense, "decoder_sparse_step": 1}


def read_balance(hf: JsonObject, coef: float = 0.001) -> float:
    """Returns the coefficient of the balance loss; transformers adds it only where `output_router_logits` is set.

    `coef` is the family's default.
    """
    return float(hf.get("router_aux_loss_coef", coef)) if hf.get("output_router_logits", False) else 0.0


def write_balance(experts: MoEConfig) -> JsonObject:
    """Returns the config.json keys of `read_balance`; its inverse."""
    coef = experts.balance_coef
    return {"output_router_logits": coef > 0, **({"router_aux_loss_coef": coef} if coef else {})}


def find_experts(config: ModelConfig) -> MoEConfig:
    """Returns the experts of a model's layers. Raises ValueError where it has none."""
    for kind in config.pattern:
        if isinstance(kind.feed_forward, MoEConfig):
            return kind.feed_forward
    raise ValueError(f"model config: family '{config.family}' has experts, and this model has no layer with them")
