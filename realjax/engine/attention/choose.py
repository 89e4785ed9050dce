"""Which attention kernel serves what: the kernels, what each of them needs, and what `auto` takes.

A new kernel is a file beside this one, a line in KERNELS, and a line in CHOICES where `auto` is to take it.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import jax.numpy as jnp
from jax import Array

from realjax.core.layout import Layout
from realjax.core.once import ONCE
from realjax.core.processes import largest
from realjax.engine.attention.blocked import blocked_attention
from realjax.engine.attention.cases import Case, Use
from realjax.engine.attention.compare import RowsFn, find_disagreement
from realjax.engine.attention.cudnn import cudnn_attention, find_api_fault
from realjax.engine.attention.fused import fused_attention, fused_decoding
from realjax.engine.attention.reference import dense_attention, dense_decoding
from realjax.engine.attention.skipping import skipping_attention
from realjax.engine.manual_axes import on_own_heads
from realjax.models.attention import AttentionFn, DecodingFn, Scoring

logger = logging.getLogger("realjax.engine")


def _need_nothing(case: Case) -> str | None:
    return None


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One implementation. `find_fault(case)` says what it needs and does not have; None where it can serve."""

    rows: RowsFn  # packed rows and prompts, with gradients
    decoding: DecodingFn | None = None
    find_fault: Callable[[Case], str | None] = _need_nothing
    is_whole: bool = True  # False: XLA cannot split it over devices
    is_compared: bool = False  # with the definition, on the device, before it is used: others make it, for this device


def _find_cap_fault(case: Case) -> str | None:
    return None if case.softcap is None else f"it does not cap scores, and the model's are capped at {case.softcap:g}"


def _find_cudnn_fault(case: Case) -> str | None:
    if case.platform != "gpu":
        return f"it needs a GPU, and the devices are of platform {case.platform}"
    if case.dtype not in ("bfloat16", "float16"):
        return f"it needs a 16-bit type, and the model computes in {case.dtype}"
    if case.capability is None or case.capability < (9, 0):
        found = "not known" if case.capability is None else "{}.{}".format(*case.capability)
        return f"for packed rows it needs compute capability 9.0 (Hopper) or later, and the devices' is {found}"
    if fault := _find_cap_fault(case):
        return fault
    if case.head_dim % 8 or case.head_dim > 256:
        return f"it needs a head size that is a multiple of 8 up to 256, and the model's is {case.head_dim}"
    return find_api_fault()


KERNELS: dict[str, Kernel] = {
    "dense": Kernel(rows=dense_attention, decoding=dense_decoding),
    "blocked": Kernel(rows=blocked_attention),
    "skipping": Kernel(rows=skipping_attention, is_whole=False),
    "xla": Kernel(rows=fused_attention, decoding=fused_decoding, find_fault=_find_cap_fault),
    "cudnn": Kernel(rows=cudnn_attention, find_fault=_find_cudnn_fault, is_whole=False, is_compared=True),
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
    Choice(kernel="skipping", uses=("rows",), platforms=("cpu",), reason="no work before a block's first segment"),
    Choice(kernel="blocked", platforms=("cpu",), reason="a fraction of the work and of the memory of dense"),
    Choice(kernel="cudnn", uses=("rows", "prefill"), reason="no scores in memory, no work across segments"),
    Choice(kernel="blocked", reason="the least memory of those that XLA compiles"),
)


def choose(name: str, case: Case, without: Iterable[str] = ()) -> Choice:
    """Returns the kernel of that name for a case; of `auto`, or where it has no form for the use, that of CHOICES.

    `auto` takes none of `without`. Raises ValueError for an unknown name, or a kernel that cannot serve the case.
    """
    if name != "auto" and name not in KERNELS:
        raise ValueError(f"attention: found '{name}'; use one of auto, {', '.join(KERNELS)}")
    if name != "auto" and (fault := KERNELS[name].find_fault(case)):
        raise ValueError(f"attention: found '{name}'; {fault}; use auto")
    if name != "auto" and (case.use != "decoding" or KERNELS[name].decoding):
        return Choice(kernel=name, reason="as the options say")
    choice = next(choice for choice in CHOICES if choice.kernel not in without and choice.fits(case))
    if name == "auto":
        return choice
    return Choice(kernel=choice.kernel, reason=f"'{name}' has no form for one query a row")


def make_attention(
    name: str, case: Case, layout: Layout | None = None, max_segment_len: int | None = None
) -> AttentionFn:
    """Returns the chosen kernel for heads split as in `layout`, and segments of at most `max_segment_len` tokens.

    A token never looks further back than its segment reaches, so a bound on segments bounds the work of long rows.
    Key-value heads that do not divide over the devices are repeated to one per query head: each device then holds its
    own. Raises ValueError as `choose`, and where a kernel that is asked for disagrees with the definition. Every
    process must call this.
    """
    kernel = KERNELS[_choose_aloud(name, case)]

    def attention_fn(q: Array, k: Array, v: Array, segment_ids: Array, scoring: Scoring, sinks: Array | None) -> Array:
        if layout is not None and k.shape[2] % layout.strategy.tp:
            k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
        attend = lambda q, k, v, segment_ids, sinks: kernel.rows(q, k, v, segment_ids, scoring, sinks, max_segment_len)
        if not kernel.is_whole and layout is not None:
            attend = on_own_heads(attend, layout)
        return attend(q, k, v, segment_ids, sinks)

    return attention_fn


def make_decoding(name: str, case: Case) -> DecodingFn:
    """Returns the chosen kernel for one new token a row. Raises ValueError as `choose`."""
    decoding = KERNELS[_choose_aloud(name, case)].decoding
    assert decoding is not None, "a line of CHOICES for decoding names a kernel that has no form for it"
    return decoding


def _choose_aloud(name: str, case: Case) -> str:
    choice, without = choose(name, case), set()
    while KERNELS[choice.kernel].is_compared:
        fault = find_disagreement(KERNELS[choice.kernel].rows, replace(case, use="rows"))
        # One program for all processes: what one cannot use, none does.
        if not largest(fault is not None):
            break
        fault = fault or "it disagrees with the definition in another process"
        if name != "auto":
            raise ValueError(f"attention: found '{name}'; {fault}; use auto")
        logger.warning("attention of %s: not %s: %s", case.use, choice.kernel, fault)
        without.add(choice.kernel)
        choice = choose(name, case, without)
    logger.info(
        "attention of %s: %s (%s), on %s in %s",
        case.use, choice.kernel, choice.reason, case.platform, case.dtype, extra=ONCE,
    )  # fmt: skip
    return choice.kernel
