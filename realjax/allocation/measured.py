"""What `realjax profile` measured on a machine: tables that the cost model reads before it believes a data sheet."""

from dataclasses import dataclass
from typing import Literal

Collective = Literal["all_gather", "reduce_scatter", "all_reduce", "permute", "all_to_all"]
Span = Literal["within_node", "between_nodes"]
LayerUse = Literal["forward", "backward", "backward_remat", "nll", "decode"]


@dataclass(frozen=True, kw_only=True)
class ProductPoint:
    """A matrix product [rows, inner] x [inner, columns] on one device, without what starting a program takes."""

    dtype: str
    rows: int
    inner: int
    columns: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class CollectivePoint:
    """A collective over a group of devices, without what starting a program takes.

    Bytes are a device's, of operand and result the larger: of what an all-gather returns, of what a reduce-scatter or
    an all-reduce is given, of what a device sends in the others.
    """

    kind: Collective
    span: Span  # the farthest link that the group crosses
    num_devices: int
    num_bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class LayerPoint:
    """One layer of a model on the devices along `tensor`, what they tell each other included.

    `decode` is a step of one token a row. `backward` is of the way back alone, where nothing is computed again; in
    `backward_remat` the layer is, and that is part of it. `nll` is both ways, of a program whose head is `nll`.
    """

    use: LayerUse
    dtype: str
    tp: int
    hidden_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    rows: int
    tokens: int  # of a row; decode: that it has in its cache
    seconds: float


@dataclass(frozen=True, kw_only=True)
class HeadPoint:
    """All that a program does beside its layers: embedding, final norm, head and loss, or the draw; and its start.

    Uses are those of a `LayerPoint`.
    """

    use: LayerUse
    dtype: str
    tp: int
    hidden_size: int
    vocab_size: int
    rows: int
    tokens: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class UpdatePoint:
    """An update of so many parameters of one device: the gradients' norm, clipping and AdamW, in float32."""

    num_params: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class SyncPoint:
    """By how much longer a training step takes on devices that have rows of their own than on one of them alone.

    That is the sum of the gradients of `num_params` parameters and, with ZeRO, the gathering of the parameters, less
    what an update of a part of them is quicker than one of all.
    """

    dtype: str
    span: Span  # the farthest link between the devices
    num_devices: int
    zero_stage: int
    num_params: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RoundPoint:
    """By how much longer a round of decoding takes on devices that have rows of their own than on one of them alone."""

    span: Span  # the farthest link between the devices
    num_devices: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class MovePoint:
    """A model's parameters brought from one device to others, of which the busiest receives so many bytes."""

    span: Span  # the farthest link between the devices
    num_bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All tables; an empty one is replaced by the data sheet's rates."""

    products: tuple[ProductPoint, ...] = ()
    collectives: tuple[CollectivePoint, ...] = ()
    layers: tuple[LayerPoint, ...] = ()
    heads: tuple[HeadPoint, ...] = ()
    updates: tuple[UpdatePoint, ...] = ()
    syncs: tuple[SyncPoint, ...] = ()
    rounds: tuple[RoundPoint, ...] = ()
    moves: tuple[MovePoint, ...] = ()
