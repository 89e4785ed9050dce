"""Random pairs of answers, ways to pack and spread them, and the engine's loss and gradients of them."""

from dataclasses import dataclass, field

import jax
import numpy as np

from realjax.core.axes import train_rules
from realjax.core.batch import Batch
from realjax.core.loss import Loss
from realjax.core.metrics import finalize
from realjax.core.trees import Tree
from realjax.data.packing import PART_LENS
from realjax.engine.compiled import place_batch
from realjax.engine.train import TrainOptions, make_gradients
from realjax.models.build import Model
from tests.given.models import make_layout, place_params, quick_jit
from tests.given.sequences import make_examples, pack_in_order

Pair = dict[str, np.ndarray]
GROUPS = (1, 3, 2, 2)  # pairs of each prompt


def make_pairs(seed: int = 0, vocab_size: int = 64) -> list[Pair]:
    """Returns the pairs of all prompts as a paired dataset gives them, the better sequence first."""
    rng = np.random.default_rng(seed)
    pairs = []
    for size in GROUPS:
        for _ in range(size):
            lengths = rng.integers(4, 24, 2)
            examples = make_examples(lengths.tolist(), int(rng.integers(1 << 30)), vocab_size)
            pair = {key: np.concatenate([example[key] for example in examples]) for key in ("tokens", "loss_mask")}
            pairs.append(pair | {"pair_weight": np.array(1 / size, np.float32), PART_LENS: lengths})
    return pairs


def halves(pair: Pair, key: str) -> list[np.ndarray]:
    """Returns a per-token array of the better and of the worse sequence."""
    return np.split(pair[key], pair[PART_LENS][:1])


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How a batch is packed, cut and laid out; none of it may change a result."""

    layout: dict = field(default_factory=dict)
    num_mbs: int = 1
    row_len: int = 48
    order: tuple[int, ...] = tuple(range(sum(GROUPS)))
    num_rows: int = 12

    def pack(self, pairs: list[Pair]) -> Batch:
        return pack_in_order(pairs, self.row_len, order=self.order, num_rows=self.num_rows)[0]


SPREADS = {
    "one device": Spread(),
    "dp2 tp2 zero3": Spread(
        layout={"dp": 2, "tp": 2, "sp": True, "zero": 3},
        num_mbs=2,
        row_len=128,
        order=(5, 2, 7, 0, 6, 1, 4, 3),
        num_rows=4,
    ),
    "pp2 tp2 dp2": Spread(
        layout={"dp": 2, "tp": 2, "pp": 2, "sp": True}, row_len=96, order=(7, 6, 5, 4, 3, 2, 1, 0), num_rows=8
    ),
}


def mean_loss_and_gradients(
    model: Model, params: Tree, loss: Loss, pairs: list[Pair], spread: Spread
) -> tuple[float, Tree, dict[str, float]]:
    """Returns the loss, its gradients and the metrics of the pairs, as a training step would have them."""
    layout = make_layout(**spread.layout)
    gradients = quick_jit(make_gradients(model, loss, layout, TrainOptions(num_mbs=spread.num_mbs)))
    placed = place_batch(spread.pack(pairs), train_rules(layout.strategy), layout)
    grads, sums = gradients(place_params(model, params, layout), placed)
    weight = float(sums.loss.weight)
    metrics = {name: float(value) for name, value in finalize(sums.metrics).items()}
    return float(sums.loss.sum) / weight, jax.tree.map(lambda g: np.asarray(g) / weight, grads), metrics
