"""Random sequences, packed into rows and taken out again, and loaders of them."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from realjax.core.batch import Batch
from realjax.data.datasets import PromptAnswerDataset
from realjax.data.loader import Loader
from realjax.data.packing import PackPlan, pack


def make_examples(
    lengths: Sequence[int], seed: int = 0, vocab_size: int = 96, prompt_share: float = 0.3
) -> list[dict[str, np.ndarray]]:
    """Returns sequences of random tokens whose last part, if anything, is to be learned."""
    rng = np.random.default_rng(seed)
    return [
        {
            "tokens": rng.integers(1, vocab_size, n, dtype=np.int32),
            "loss_mask": np.arange(n) >= max(1, int(prompt_share * n)),
        }
        for n in lengths
    ]


def pack_in_order(
    examples: Sequence[dict[str, np.ndarray]],
    row_len: int,
    *,
    order: Iterable[int] | None = None,
    num_rows: int | None = None,
) -> tuple[Batch, PackPlan]:
    """Returns the sequences put in `order` into row after row, empty rows last; row_len of the longest: one a row."""
    rows: list[list[int]] = [[]]
    lengths = tuple(len(example["tokens"]) for example in examples)
    for i in range(len(examples)) if order is None else order:
        if sum(lengths[j] for j in rows[-1]) + lengths[i] > row_len:
            rows.append([])
        rows[-1].append(i)
    plan = PackPlan(row_len=row_len, rows=tuple(map(tuple, rows)), lengths=lengths)
    return pack(examples, plan, num_rows=num_rows), plan


def one_per_row(examples: Sequence[dict[str, np.ndarray]]) -> tuple[Batch, PackPlan]:
    """Returns one sequence a row, padded on the right to the longest."""
    lengths = tuple(len(example["tokens"]) for example in examples)
    plan = PackPlan(row_len=max(lengths), rows=tuple((i,) for i in range(len(lengths))), lengths=lengths)
    return pack(examples, plan), plan


def unpack_array(array: Any, plan: PackPlan) -> list[np.ndarray]:
    """Returns an array's part of each sequence, in the plan's order: `[L, ...]` of `[R, T, ...]`, 0-d of `[R, S]`."""
    array = np.asarray(array)
    assert plan.num_segments != plan.row_len, "the width does not tell which of the two it is"
    is_per_token = array.shape[1] == plan.row_len
    places = {index: (row, tokens if is_per_token else segment) for index, row, segment, tokens in plan.places()}
    return [array[places[index]] for index in range(len(plan.lengths))]


def make_dataset(lengths: list[int], seed: int = 0) -> PromptAnswerDataset:
    """Returns examples of random tokens of these lengths, learned in their last part."""
    examples = make_examples(lengths, seed)
    return PromptAnswerDataset(
        ids=tuple(range(len(lengths))),
        tokens=np.concatenate([example["tokens"] for example in examples]),
        offsets=np.cumsum([0, *lengths]),
        loss_mask=np.concatenate([example["loss_mask"] for example in examples]),
    )


def make_loader(**changes) -> Loader:
    """Returns 3 steps of 4 examples, in one epoch."""
    dataset = make_dataset([5, 9, 7, 12, 8, 6, 11, 10, 4, 13, 7, 9])
    return Loader(dataset, **{"batch_size": 4, "num_epochs": 1, "seed": 1, **changes})
