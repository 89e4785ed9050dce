"""Which attention kernel serves what: the kernels, what each of them needs, and what `auto` takes.

A new kernel is a file beside this one, a line in KERNELS, and a line in CHOICES where `auto` is to take it.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax.numpy as jnp
from jax import Array

from realjax.core.layout import Layout
from realjax.engine.attention.blocked import blocked_attention
from realjax.engine.attention.fused import fused_attention, fused_decoding
from realjax.engine.attention.reference import dense_attention, dense_decoding
from realjax.models.attention import AttentionFn, DecodingFn
from realjax.models.config import ModelConfig

logger = logging.getLogger("realjax.engine")

# Packed rows of a training step or of inference; whole prompts, one a row; one new token a row against the cache.
Use = Literal["rows", "prefill", "decoding"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a kernel is to serve."""

    use: Use
    platform: str  # "cpu", "gpu", "tpu"
    dtype: str
    head_dim: int

    @classmethod
    def of(cls, use: Use, config: ModelConfig, layout: Layout, dtype: jnp.dtype) -> "Case":
        """Returns the case of a model that computes in `dtype` on a layout's devices."""
        return cls(use=use, platform=layout.devices[0].platform, dtype=dtype.name, head_dim=config.head_dim)


def _need_nothing(case: Case) -> str | None:
    return None


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One implementation. `find_fault(case)` says what it needs and does not have; None where it can serve."""

    rows: AttentionFn  # packed rows and prompts, with gradients
    decoding: DecodingFn | None = None
    find_fault: Callable[[Case], str | None] = _need_nothing


def _find_cudnn_fault(case: Case) -> str | None:
    if case.platform != "gpu":
        return f"it needs a GPU, and the devices are of platform {case.platform}"
    if case.dtype not in ("bfloat16", "float16"):
        return f"it needs a 16-bit type, and the model computes in {case.dtype}"
    if case.head_dim % 8 or case.head_dim > 256:
        return f"it needs a head size that is a multiple of 8 up to 256, and the model's is {case.head_dim}"
    return None


KERNELS: dict[str, Kernel] = {
    "dense": Kernel(rows=dense_attention, decoding=dense_decoding),
    "blocked": Kernel(rows=blocked_attention),
    "xla": Kernel(rows=partial(fused_attention, implementation="xla"), decoding=fused_decoding),
    "cudnn": Kernel(rows=partial(fused_attention, implementation="cudnn"), find_fault=_find_cudnn_fault),
}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A kernel for some cases, and why."""

    kernel: str
    reason: str
    uses: tuple[Use, ...] = ("rows", "prefill", "decoding")
    platforms: tuple[str, ...] | None = None  # None: any

    def fits(self, case: Case) -> bool:
        """Whether the case is one of these, and the kernel can serve it."""
        is_meant = case.use in self.uses and (self.platforms is None or case.platform in self.platforms)
        return is_meant and KERNELS[self.kernel].find_fault(case) is None


# What `auto` takes: the first line that fits.
CHOICES = (
    Choice(kernel="dense", uses=("decoding",), reason="a query alone leaves nothing to cut into blocks"),
    Choice(kernel="blocked", platforms=("cpu",), reason="a fraction of the work and of the memory of dense"),
    # Compiled for H100s, XLA's takes up to a third more of a step's memory. cuDNN's was never run, and its bias for a
    # mask is [T, T] of memory again.
    Choice(kernel="blocked", reason="the least memory"),
)


def choose(name: str, case: Case) -> Choice:
    """Returns the kernel of that name for a case; of `auto`, or where it has no form for the use, that of CHOICES.

    Raises ValueError for an unknown name, or a kernel that cannot serve the case.
    """
    if name != "auto" and name not in KERNELS:
        raise ValueError(f"attention: found '{name}'; use one of auto, {', '.join(KERNELS)}")
    if name != "auto" and (fault := KERNELS[name].find_fault(case)):
        raise ValueError(f"attention: found '{name}'; {fault}; use auto")
    if name != "auto" and (case.use != "decoding" or KERNELS[name].decoding):
        return Choice(kernel=name, reason="as the options say")
    choice = next(choice for choice in CHOICES if choice.fits(case))
    if name == "auto":
        return choice
    return Choice(kernel=choice.kernel, reason=f"'{name}' has no form for one query a row")


def make_attention(name: str, case: Case, num_shards: int = 1, max_segment_len: int | None = None) -> AttentionFn:
    """Returns the chosen kernel for heads split over `num_shards` devices and segments of at most `max_segment_len`.

    A token never looks further back than its segment reaches, so a bound on segments bounds the work of long rows.
    Key-value heads that do not divide over the shards are repeated to one per query head: each shard then holds its
    own. Raises ValueError as `choose`.
    """
    attend = KERNELS[_choose_aloud(name, case)].rows

    def attention_fn(q: Array, k: Array, v: Array, segment_ids: Array, window: int | None) -> Array:
        if k.shape[2] % num_shards:
            k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
        bounds = [bound for bound in (window, max_segment_len) if bound is not None and bound < q.shape[1]]
        return attend(q, k, v, segment_ids, min(bounds, default=None))

    return attention_fn


def make_decoding(name: str, case: Case) -> DecodingFn:
    """Returns the chosen kernel for one new token a row. Raises ValueError as `choose`."""
    decoding = KERNELS[_choose_aloud(name, case)].decoding
    assert decoding is not None, "a line of CHOICES for decoding names a kernel that has no form for it"
    return decoding


def _choose_aloud(name: str, case: Case) -> str:
    choice = choose(name, case)
    logger.info(
        "attention of %s: %s (%s), on %s in %s",
        case.use, choice.kernel, choice.reason, case.platform, case.dtype,
    )  # fmt: skip
    return choice.kernel
