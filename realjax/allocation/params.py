"""How many parameters a model of the house has, by its description alone: the planner builds no models."""

from realjax.models.config import AttentionConfig, LayerKind, MLPConfig, ModelConfig, MoEConfig, NormConfig


def count_params(config: ModelConfig) -> int:
    """Returns the scalars in a model's parameters, without those of empty layers."""
    D, V = config.hidden_size, config.vocab_size
    tables = D * (V + (config.max_positions if config.learned_positions else 0))
    head = 0 if config.tied else D if config.is_critic else D * V
    return tables + head + _count_norm(config.norm, D) + sum(_count_layer(config, kind) for kind in config.layers)


def count_trained(config: ModelConfig) -> int:
    """Returns those scalars that training changes: of a model with adapters these, and a critic's head."""
    if config.lora is None:
        return count_params(config)
    head = config.hidden_size if config.is_critic else 0
    return head + config.lora.rank * sum(_count_sides(config, kind) for kind in config.layers)


def _count_sides(config: ModelConfig, kind: LayerKind) -> int:
    """Returns the inputs and outputs of all maps of a layer that have an adapter."""
    D, F = config.hidden_size, config.ffn_size
    queries, keys = config.num_q_heads * config.head_dim, config.num_kv_heads * config.head_dim
    sides = {"q": D + queries, "k": D + keys, "v": D + keys, "o": D + queries, "up": D + F, "down": D + F}
    if isinstance(kind.feed_forward, MLPConfig) and kind.feed_forward.gated:
        sides["gate"] = D + F
    return sum(size for target, size in sides.items() if config.find_adapter(target) is not None)


def _count_layer(config: ModelConfig, kind: LayerKind) -> int:
    norms = (kind.attn_norm, kind.attn_post_norm, kind.mlp_norm, kind.mlp_post_norm)
    feed_forward = kind.feed_forward
    is_mlp = isinstance(feed_forward, MLPConfig)
    fed = _count_mlp(config, feed_forward) if is_mlp else _count_moe(config.hidden_size, feed_forward)
    return sum(_count_norm(norm, config.hidden_size) for norm in norms) + _count_attention(config, kind.mixer) + fed


def _count_attention(config: ModelConfig, mixer: AttentionConfig) -> int:
    D, H, N, K = config.hidden_size, config.head_dim, config.num_q_heads, config.num_kv_heads
    biases = mixer.qkv_bias * (N + 2 * K) * H + mixer.o_bias * D
    norms = _count_norm(mixer.qk_norm, ((N + K) if mixer.qk_norm_whole else 2) * H)
    return 2 * D * H * (N + K) + biases + norms + mixer.sinks * N


def _count_mlp(config: ModelConfig, mlp: MLPConfig) -> int:
    D, F, num_up = config.hidden_size, config.ffn_size, 1 + mlp.gated
    return (num_up + 1) * D * F + mlp.bias * (num_up * F + D)


def _count_moe(D: int, moe: MoEConfig) -> int:
    E, M, S = moe.num_experts, moe.expert_size, moe.shared_size or 0
    router = E * (D + moe.router_bias + moe.has_offset)
    shared = 3 * D * S + moe.shared_gate * D
    return router + E * (3 * D * M + moe.bias * (2 * M + D)) + shared


def _count_norm(norm: NormConfig | None, size: int) -> int:
    return 0 if norm is None else size * (2 if norm.kind == "layer" else 1)
