"""What `realjax profile` measured on a machine: tables that the cost model reads before it believes a data sheet."""

from dataclasses import dataclass
from typing import Literal

Collective = Literal["all_gather", "reduce_scatter", "all_reduce", "permute", "all_to_all"]
Span = Literal["within_node", "between_nodes"]


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
    """One layer of a model, whole, on one device. `decode` is a step of one token a row."""

    use: Literal["forward", "backward", "decode"]  # backward: of the way back alone, nothing is computed again
    dtype: str
    hidden_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    rows: int
    tokens: int  # of a row; decode: that it has in its cache
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All tables; an empty one is replaced by the data sheet's rates."""

    products: tuple[ProductPoint, ...] = ()
    collectives: tuple[CollectivePoint, ...] = ()
    layers: tuple[LayerPoint, ...] = ()
