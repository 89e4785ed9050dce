"""What each device of a layout has of a model's parameters, and of what its layers compute: by the tables of
`core.axes`, in numbers alone.
"""

from dataclasses import dataclass
from functools import lru_cache

from realjax.allocation.workload import ModelShape
from realjax.core.layout import ParallelStrategy

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def item_bytes(dtype: str) -> int:
    """Returns the bytes of a number. Raises ValueError for a type that no model computes in."""
    if dtype not in ITEM_BYTES:
        raise ValueError(f"dtype: found '{dtype}'; use one of {', '.join(ITEM_BYTES)}")
    return ITEM_BYTES[dtype]


@dataclass(frozen=True, kw_only=True)
class Split:
    """A device's part of a model's dims, and of its parameters."""

    hidden: int  # never split
    num_layers: int  # of a stage, empty ones counted
    queries: float  # heads times their size, of queries
    keys: float  # of keys, and of values
    ffn: float  # times the experts that a token goes to
    layers: float  # parameters of the stage's layers that ZeRO splits, experts among them
    experts: float  # those of experts that share the device, among several
    outer: float  # those of the table and the head
    whole: float  # those that are never split: scales of norms
    vocab: float
    num_shards: int  # devices with rows of their own
    expert_replicas: int  # of these, how many have the same experts
    row_parts: int  # devices that share a row's norms and residuals

    @classmethod
    @lru_cache(maxsize=4096)
    def of(cls, model: ModelShape, s: ParallelStrategy, expert_shards: int = 1) -> "Split":
        """Returns the split of a model under a strategy, its experts shared by so many devices."""
        D = model.hidden_size
        num_layers = -(-model.num_layers // s.pp)
        queries = model.num_q_heads * model.head_dim / s.tp
        # Key-value heads that do not divide over `tensor` are whole on every device.
        keys = model.num_kv_heads * model.head_dim / (1 if model.num_kv_heads % s.tp else s.tp)
        experts = model.sparse_share * model.num_experts / expert_shards * model.expert_params / s.tp
        beside = model.beside_params / s.tp  # a router is whole, but small
        vocab = model.vocab_size / (s.tp if model.vocab_size % (s.tp * s.pp) else s.tp * s.pp)
        table = D * vocab
        head = D if model.is_critic else 0 if model.is_tied else table
        return cls(
            hidden=D,
            num_layers=num_layers,
            queries=queries,
            keys=keys,
            ffn=(model.sparse_share * model.ffn_size * model.experts_per_token + model.beside_size) / s.tp,
            layers=num_layers * (2 * D * (queries + keys) + experts + beside),
            experts=num_layers * experts if model.num_experts > 1 else 0,
            outer=table + head,
            whole=(2 * num_layers + 1) * D,
            vocab=vocab,
            num_shards=s.dp,
            expert_replicas=max(1, s.dp // expert_shards),
            row_parts=s.tp if s.sequence_parallel else 1,
        )

    @property
    def largest_stack(self) -> float:
        """Returns the parameters of one kernel of all the stage's layers: the largest there is."""
        return self.num_layers * self.hidden * max(self.ffn, self.queries)

    def params(self, *, is_sharded: bool = False) -> float:
        """Returns the parameters on a device; `is_sharded`: ZeRO has split them over those that had the same."""
        if not is_sharded:
            return self.layers + self.outer + self.whole
        others = self.layers - self.experts + self.outer
        return others / self.num_shards + self.experts / self.expert_replicas + self.whole


@dataclass(frozen=True, kw_only=True)
class LayerBytes:
    """Bytes that a layer takes of a device for a micro-batch of so many tokens there.

    The factors are those of compiled programs (`tools.bench.memory_model`): XLA decides what it fuses and what it
    writes. They count arrays of the model's width, whole (`_rows`) or as sequence parallelism splits them (`_part`),
    of the feed-forward's width, and the layer's parameters in the compute dtype, which are sliced out of their stack.
    """

    split: Split
    tokens: float
    size: int  # of a number
    is_gathered: bool = False  # ZeRO stage 3: parameters are made whole, and their gradients are, in float32
    is_added: bool = False  # to the gradients of other micro-batches: float32 ones of a layer lie beside the sums
    is_stage: bool = False  # of a pipeline

    @property
    def kept_remat(self) -> float:
        """What the backward pass reads, where it computes the layer again: its input."""
        return self._part

    @property
    def kept_whole(self) -> float:
        """What it reads otherwise: inputs of products, float32 ones of norms, all of the feed-forward's numbers.

        A loop over stages carries whole inputs of products that XLA elsewhere gathers again.
        """
        rows, parts = (4.0, 7.2) if self.is_stage else (1.6, 10.2)
        return rows * self._rows + parts * self._part + 7.9 * self._ffn

    @property
    def backward(self) -> float:
        """The most while the gradient of one layer is computed."""
        return 4.8 * self._rows + 6.6 * self._ffn + self._heads + self._params * self._copies

    @property
    def forward(self) -> float:
        """The most while one layer is computed and nothing is kept of it."""
        return 1.4 * self._rows + 0.75 * self._part + 2.5 * self._ffn + 0.3 * self._params

    @property
    def _copies(self) -> float:
        """Of the layer's parameters in the compute dtype: sliced, or made whole, and float32 gradients."""
        return (2 if self.is_gathered else 1) + (4 / self.size if self.is_gathered or self.is_added else 0)

    @property
    def _rows(self) -> float:
        return self.tokens * self.split.hidden * self.size

    @property
    def _part(self) -> float:
        return self._rows / self.split.row_parts

    @property
    def _ffn(self) -> float:
        return self.tokens * self.split.ffn * self.size

    @property
    def _heads(self) -> float:
        return self.tokens * (self.split.queries + self.split.keys) * self.size

    @property
    def _params(self) -> float:
        return self.split.layers / self.split.num_layers * self.size
