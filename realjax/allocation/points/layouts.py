"""How publications spell layouts: `tp8 pp4 dp2`, `fsdp tp8 mbs3`, `cp2 vp5 full recompute`."""

import re
from dataclasses import dataclass

from realjax.allocation.choice import Choice
from realjax.core.layout import ParallelStrategy

NUMBERS = ("tp", "pp", "dp", "cp", "ep", "vp", "mbs", "zero", "fsdp", "batch")
# Words that say nothing of a layout; the dtype is read with the model's name.
OTHERS = {"recompute", "full", "selective", "no", "none", "local", "sp", "fp8", "bf16", "fp16", "float8", "heuristic"}
OTHERS |= {"searched", "remat", "compile", "fsdp", "ddp", "hsdp", "flash", "te", "async"}


@dataclass(frozen=True, kw_only=True)
class PointLayout:
    """A layout as a row names it; what it does not say is what its source does by default."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1
    vp: int = 1
    mbs: int | None = None  # sequences of a micro-batch
    batch: int | None = None
    is_local: bool = False  # the batch is a replica's
    zero_stage: int = 0
    sequence_parallel: bool = False
    remat: bool | None = None  # None: it does not say
    words: frozenset[str] = frozenset()

    @property
    def micro_batch(self) -> int | None:
        """Sequences of a micro-batch, where the layout decides: in stages one where nothing else is said. None: all of
        a replica's."""
        return self.mbs or (1 if self.pp > 1 else None)

    def count_sequences(self, batch: int | None) -> int:
        """Returns the sequences of a step: as given, or of a local batch those of all replicas. Where neither is said,
        only a rate was measured, which many micro-batches have: eight, and four a stage."""
        if batch:
            return batch
        if self.is_local and self.batch:
            return self.batch * self.dp
        return (self.micro_batch or 1) * self.dp * max(8, 4 * self.pp)


def read_layout(text: str, num_gpus: int) -> PointLayout:
    """Returns the layout of a row. What tp, pp and cp leave of the GPUs is dp. Raises ValueError for unknown words and
    sizes that do not make up the GPUs."""
    words = text.lower().replace(",", " ").replace("=", "")
    words = re.sub(r"\b(batch|mbs|tp|pp|dp|cp|ep|vp|zero) +(\d+)", r"\1\2", words)
    numbers: dict[str, int] = {}
    for word in words.split():
        match = re.fullmatch(rf"({'|'.join(NUMBERS)})(\d+)", word)
        if match:
            numbers[match[1]] = int(match[2])
        elif word not in OTHERS:
            raise ValueError(
                f"layout '{text}': '{word}' is not known; use sizes such as tp8, pp4, dp2, fsdp8, cp2, ep8, vp5, mbs1, "
                "zero1 and words such as sp, full recompute, selective recompute, local batch 12"
            )
    found, is_fsdp = set(words.split()), "fsdp" in words
    tp, pp, cp = (numbers.get(name, 1) for name in ("tp", "pp", "cp"))
    # Replicas of groups that shard (HSDP) are written with both.
    replicas = numbers.get("dp", 1) * numbers.get("fsdp", 1)
    dp = replicas if numbers.keys() & {"dp", "fsdp"} else num_gpus // (tp * pp * cp)
    if tp * pp * cp * dp != num_gpus:
        raise ValueError(f"layout '{text}': tp{tp} x pp{pp} x cp{cp} x dp{dp} are not the {num_gpus} GPUs of the row")
    speaks = "recompute" in found
    return PointLayout(
        tp=tp,
        pp=pp,
        dp=dp,
        cp=cp,
        ep=numbers.get("ep", 1),
        vp=numbers.get("vp", 1),
        mbs=numbers.get("mbs"),
        batch=numbers.get("batch"),
        is_local="local" in found,
        # Megatron's distributed optimizer is the rule beside FSDP, which in stages keeps what it gathered for a step.
        zero_stage=numbers.get("zero", (2 if pp > 1 else 3) if is_fsdp else 1 if dp * cp > 1 else 0),
        # Where a row speaks of what is computed again, it speaks of sequence parallelism too; else it is the rule.
        sequence_parallel=tp > 1 and ("sp" in found or not speaks),
        remat=not found & {"no", "none", "selective"} if speaks or "remat" in found else None,
        words=frozenset(found),
    )


def place(layout: PointLayout, num_gpus: int, num_mbs: int = 1) -> Choice:
    """Returns the choice of a layout on devices 0 to n - 1."""
    strategy = ParallelStrategy(
        dp=layout.dp,
        pp=layout.pp,
        tp=layout.tp,
        sequence_parallel=layout.sequence_parallel,
        zero_stage=layout.zero_stage,
    )
    return Choice(
        strategy=strategy,
        devices=tuple(range(num_gpus)),
        num_mbs=num_mbs,
        remat=bool(layout.remat),
        context=layout.cp,
        experts=layout.ep,
        interleave=layout.vp,
    )
