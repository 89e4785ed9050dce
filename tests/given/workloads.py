"""Steps of training as the planner sees them, without options or files."""

from realjax.allocation.cluster import Cluster, Link
from realjax.allocation.workload import CallWork, Fixed, Kind, Lengths, ModelShape, RoleWork, Workload

PROMPT, ANSWER = 128, 384
LLAMA = {
    7: {"hidden_size": 4096, "num_layers": 32, "num_q_heads": 32, "num_kv_heads": 32, "ffn_size": 11008},
    70: {"hidden_size": 8192, "num_layers": 80, "num_q_heads": 64, "num_kv_heads": 8, "ffn_size": 28672},
}
TINY = {"hidden_size": 64, "num_layers": 4, "num_q_heads": 4, "num_kv_heads": 2, "ffn_size": 128}


def make_shape(billions: int = 0, **changes) -> ModelShape:
    """Returns the shape of a Llama of 7 or 70 billion parameters, or of a tiny one."""
    sizes = {**(LLAMA[billions] if billions else TINY), "vocab_size": 32000 if billions else 96, **changes}
    return ModelShape(head_dim=sizes["hidden_size"] // sizes["num_q_heads"], **sizes)


def make_role(name: str, model: ModelShape, **changes) -> RoleWork:
    return RoleWork(name=name, model=model, dtype="bfloat16", **changes)


def make_call(name: str, kind: Kind, role: RoleWork, **changes) -> CallWork:
    """Returns a call on sequences of prompt and answer, each in a row of its own."""
    own = {"num_sequences": 256, "num_updates": 1, "fixed": Fixed(), **changes}
    num_rows = own["num_sequences"] // own["num_updates"]
    whole = Lengths.all(PROMPT + ANSWER)
    return CallWork(
        name=name,
        role=role.name,
        kind=kind,
        model=role.model,
        dtype=role.dtype,
        prompts=Lengths.all(PROMPT) if kind == "generate" else whole,
        answers=Lengths.all(ANSWER) if kind == "generate" else None,
        pack_fn=lambda multiple: (-(-num_rows // multiple) * multiple, PROMPT + ANSWER),
        scores_vocab=not role.model.is_critic,
        **own,
    )


def make_ppo(actor: int, critic: int, num_sequences: int = 256, num_updates: int = 4) -> Workload:
    """Returns a step of PPO: an actor and a reference of one size, a critic and a reward model of another."""
    large, small = make_shape(actor), make_shape(critic, is_critic=True)
    roles = {
        "actor": make_role("actor", large, is_trained=True),
        "ref": make_role("ref", large),
        "critic": make_role("critic", small, is_trained=True),
        "rew": make_role("rew", small),
    }
    made = {"num_sequences": num_sequences}
    scored = {"after": ("actor_gen",), **made}
    trained = {"after": ("actor_gen", "rew_inf", "ref_inf", "critic_inf"), "num_updates": num_updates, **made}
    calls = (
        make_call("actor_gen", "generate", roles["actor"], **made),
        make_call("rew_inf", "inference", roles["rew"], **scored),
        make_call("ref_inf", "inference", roles["ref"], **scored),
        make_call("critic_inf", "inference", roles["critic"], **scored),
        make_call("actor_train", "train", roles["actor"], **trained),
        make_call("critic_train", "train", roles["critic"], **trained),
    )
    return Workload(calls=calls, roles=roles)


def make_cluster(num_nodes: int = 1, devices_per_node: int = 8, memory_gib: float = 80.0) -> Cluster:
    """Returns a cluster with the rates of an H100's data sheet."""
    return Cluster(
        name=f"given {num_nodes}x{devices_per_node}",
        num_nodes=num_nodes,
        devices_per_node=devices_per_node,
        memory_bytes=int(memory_gib * 2**30),
        matmul_flops={"bfloat16": 989e12, "float32": 67e12},
        memory_bandwidth=3.35e12,
        within_node=Link(bandwidth=450e9, latency=10e-6),
        between_nodes=Link(bandwidth=50e9, latency=20e-6),
        to_host=Link(bandwidth=55e9, latency=10e-6),
        dispatch_seconds=50e-6,
    )
