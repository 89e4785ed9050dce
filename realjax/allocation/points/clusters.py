"""The machines of published measurements: the defaults by name, and kinds that are known from publications alone."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from realjax.allocation.cluster import Cluster, find_cluster


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of accelerator, as what of a default differs."""

    like: str
    factors: Mapping[str, float] = field(default_factory=dict)
    changes: Mapping[str, int | float] = field(default_factory=dict)


# What was fitted to published rows is one rate of a kind: the share of its products' peak.
KINDS: Mapping[str, Kind] = {
    "a100": Kind(like="a100"),
    "a100-40gb": Kind(like="a100", changes={"memory_bytes": 40 * 2**30, "memory_bandwidth": 1.555e12}),
    "h100": Kind(like="h100"),
    "h200": Kind(like="h200"),
    "b200": Kind(like="b200"),
    # torchtitan's benchmarks: HBM2e, limited to 500 W.
    "h100-96gb-500w": Kind(
        like="h100",
        factors={"products": 0.37},
        changes={"memory_bytes": 96 * 10**9, "memory_bandwidth": 2.4e12},
    ),
    # ReaL's figure, on a machine that is not certain: one rate for all that it does. PyTorch without CUDA graphs starts
    # a layer's kernels one by one, and a collective beside them.
    "h100?": Kind(
        like="h100",
        factors={"products": 0.2, "links": 0.2, "memory": 0.2, "layer_seconds": 1.1e-3, "call_seconds": 1e-4},
    ),
}
# Megatron's attention before FlashAttention: scores are written and read by a product, scale and mask, softmax, dropout
# and a product, 14 bytes a score (arXiv:2205.05198, section 4.1); recomputed alone, a third more of all passes.
UNFUSED = {"full": 14.0, "selective": 14.0 * 4 / 3}
# TensorRT-LLM keeps caches in pages, and a layer's kernels in a CUDA graph.
SERVED = {"paged": 1.0}


def find_point_cluster(gpu: str, num_gpus: int, *, is_served: bool = False) -> Cluster:
    """Returns so many GPUs of a kind, in nodes of 8. Raises ValueError for a kind that is not known."""
    name = re.sub(r"\s+", "-", gpu.strip().lower())
    if name not in KINDS:  # what a data sheet says too
        name = re.sub(r"[-(]*(nvidia|sxm\d?|dgx|hgx|80gb|141gb|hbm3e?|fp8|bf16)[-)]*", "", name)
    if name not in KINDS:
        raise ValueError(f"gpu '{gpu}' is not known; use {', '.join(KINDS)}")
    kind = KINDS[name]
    cluster = find_cluster(kind.like).resize(num_gpus)
    factors = {**cluster.factors, **kind.factors, **(SERVED if is_served else {})}
    return replace(cluster, name=f"{name}x{num_gpus}{' served' if is_served else ''}", factors=factors, **kind.changes)
