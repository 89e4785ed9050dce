"""Calls of Llama-7B's shape, and choices for them, as tests of costs weigh them."""

from dataclasses import replace

from realjax.allocation.choice import Choice
from realjax.allocation.cluster import find_cluster
from realjax.allocation.workload import CallWork, Lengths, ModelShape
from realjax.core.layout import ParallelStrategy

LLAMA = ModelShape(
    hidden_size=4096, num_layers=32, num_q_heads=32, num_kv_heads=32, head_dim=128, ffn_size=11008, vocab_size=32000
)
H100S = find_cluster("h100x128")


def make_work(kind: str, **changes) -> CallWork:
    """Returns a call on 64 sequences of 512 tokens, four of which lie in a row."""
    given = {"prompts": Lengths.all(128), "answers": Lengths.all(384)} if kind == "generate" else {}
    work = CallWork(
        name="call",
        role="role",
        kind=kind,
        model=LLAMA,
        dtype="bfloat16",
        num_sequences=64,
        prompts=Lengths.all(512),
        pack_fn=lambda multiple: (-(-16 // multiple) * multiple, 2048),
    )
    return replace(work, **{**given, **changes})


def choose(first: int = 0, **sizes) -> Choice:
    """Returns a choice of consecutive devices."""
    own = {name: sizes.pop(name) for name in list(sizes) if name in ParallelStrategy.__dataclass_fields__}
    strategy = ParallelStrategy(**own)
    num = strategy.size * sizes.get("context", 1)
    return Choice(strategy=strategy, devices=tuple(range(first, first + num)), **sizes)
