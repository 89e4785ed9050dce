"""Published measurements beside what the cost model predicts for them: how the model is judged.

A row is of kind train (seconds a step, tokens a second and GPU, or FLOP a second and GPU), decode (output tokens a
second of all GPUs) or rlhf (seconds of a step of PPO's six calls, or of GRPO's four).
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median

from realjax.allocation.choice import Choice
from realjax.allocation.cluster import Cluster
from realjax.allocation.cost import call_cost
from realjax.allocation.points.clusters import UNFUSED, find_point_cluster
from realjax.allocation.points.known_models import find_model
from realjax.allocation.points.layouts import PointLayout, place, read_layout
from realjax.allocation.points.rlhf import predict_rlhf, search_step
from realjax.allocation.points.rows import Row, RowPrediction, SearchFn, read_rows
from realjax.allocation.terms.rates import BYTES
from realjax.allocation.workload import CallWork, Lengths, ModelShape


def predict_points(path: Path, search_fn: SearchFn | None = search_step) -> list[RowPrediction]:
    """Returns a prediction for every row of a file; `search_fn` plans rows of layout `searched`; without one they
    are left out. Raises ValueError, with the line in front, for a row that cannot be read."""
    rows, found = read_rows(Path(path)), []
    for row in rows:
        if row.layout.startswith("searched") and search_fn is None:
            continue
        try:
            found.append(predict_row(row, search_fn))
        except ValueError as error:
            raise ValueError(f"{Path(path).name}, line {row.line}: {error}") from None
    return found


def predict_row(row: Row, search_fn: SearchFn | None = None) -> RowPrediction:
    """Returns the prediction of one row."""
    if row.kind not in PREDICT:
        raise ValueError(f"kind '{row.kind}' is not known; use {', '.join(PREDICT)}")
    return PREDICT[row.kind](row, search_fn)


def _predict_train(row: Row, search_fn: SearchFn | None) -> RowPrediction:
    layout, length = read_layout(row.layout, row.num_gpus), _whole(row.lengths)
    cluster = find_train_cluster(row, layout)
    batch = layout.count_sequences(row.batch)
    work, choice = describe_train(find_model(row.model), layout, batch, length, row)
    cost = call_cost(work, replace(choice, remat=needs_remat(work, layout, choice, cluster)), cluster)
    tokens = batch * length / row.num_gpus
    if row.unit == "s/step":
        return RowPrediction(row=row, predicted=cost.seconds, cost=cost)
    if row.unit == "tok/s/GPU":
        return RowPrediction(row=row, predicted=tokens / cost.seconds, cost=cost)
    if row.unit == "TFLOP/s/GPU":
        flops = tokens * count_flops(find_model(row.model), length)
        return RowPrediction(row=row, predicted=flops / cost.seconds / 1e12, cost=cost)
    raise ValueError(f"unit '{row.unit}' of a train row is not known; use s/step, tok/s/GPU or TFLOP/s/GPU")


def describe_train(
    model: ModelShape, layout: PointLayout, batch: int, length: int, row: Row
) -> tuple[CallWork, Choice]:
    """Returns the work and the choice of a training step of `batch` sequences."""
    # Sequences of a micro-batch lie in one row, so that the rows of a device are its micro-batches.
    of_replica = max(1, batch // layout.dp)
    per_row = min(layout.micro_batch or of_replica, of_replica)
    work = CallWork(
        name="train",
        role="model",
        kind="train",
        model=model,
        dtype="float8_e4m3fn" if is_fp8(row) else "bfloat16",
        num_sequences=batch,
        prompts=Lengths.all(length),
        pack_fn=lambda multiple: (batch / per_row, per_row * length),
    )
    return work, place(layout, row.num_gpus, num_mbs=max(1, round(batch / per_row / layout.dp)))


def needs_remat(work: CallWork, layout: PointLayout, choice: Choice, cluster: Cluster) -> bool:
    """Returns whether layers are computed again: as the row says, else where what they keep does not fit in nine tenths
    of the memory beside masters, moments and gradients (16 bytes a parameter, split by ZeRO)."""
    if layout.remat is not None:
        return layout.remat
    model, s = work.model, choice.strategy
    rows, row_len = work.pack_fn(1)
    tokens = rows * row_len / (s.dp * choice.context * choice.num_mbs) * min(s.pp, choice.num_mbs)
    heads = (2 * model.num_q_heads + 2 * model.num_kv_heads) * model.head_dim
    ffn = (3 if model.is_gated else 2) * model.ffn_size * model.experts_per_token
    kept = 2 * tokens * (model.num_layers / s.pp) * (4 * model.hidden_size + heads + ffn) / s.tp
    kept += 8 * tokens * model.vocab_size / (s.tp * s.pp)  # float32 logits and their gradients
    shards = s.dp * choice.context if s.zero_stage else 1
    return kept + 16 * model.num_params / (s.tp * s.pp * shards) > 0.9 * cluster.memory_bytes


def find_train_cluster(row: Row, layout: PointLayout) -> Cluster:
    """Returns the row's machine; where an A100's row speaks of recomputation as Megatron did in 2022, its attention is
    that of the time."""
    cluster = find_point_cluster(row.gpu, row.num_gpus)
    word = next((word for word in UNFUSED if word in layout.words), None)
    if word is None or not row.gpu.lower().startswith("a100"):
        return cluster
    factors = {**cluster.factors, "score_bytes": UNFUSED[word]}
    return replace(cluster, name=f"{cluster.name} {word}", factors=factors)


def count_flops(model: ModelShape, length: int) -> float:
    """Returns what MaxText counts for a token: six for each parameter that multiplies, and attention without its mask,
    12 x layers x heads x head size x length."""
    return 6 * model.active_params + 12 * model.num_layers * model.num_q_heads * model.head_dim * length


def is_fp8(row: Row) -> bool:
    """Returns whether a row's products are in 8 bits."""
    text = f"{row.model} {row.layout} {row.gpu}".lower()
    return "fp8" in text or "float8" in text


def _predict_decode(row: Row, search_fn: SearchFn | None) -> RowPrediction:
    """Output tokens over the seconds of prompts and decoding. Without a batch as many rows are decoded at once as their
    caches have room for, and there are enough of them that no wave is short."""
    model, layout = find_model(row.model), read_layout(row.layout, row.num_gpus)
    prompt, new = (int(part) for part in row.lengths.split("+"))
    cluster = find_point_cluster(row.gpu, row.num_gpus, is_served=True)
    dtype = "float8_e4m3fn" if is_fp8(row) else "float16"
    batch = row.batch or layout.batch or fit_rows(model, layout, prompt + new, dtype, cluster)
    work = CallWork(
        name="decode",
        role="model",
        kind="generate",
        model=model,
        dtype=dtype,
        num_sequences=batch if row.batch or layout.batch else 8 * batch,
        prompts=Lengths.all(prompt),
        answers=Lengths.all(new),
        pack_fn=lambda multiple: (batch, prompt + new),
    )
    choice = replace(place(layout, row.num_gpus), num_slots=batch)
    cost = call_cost(work, choice, with_cache(cluster, is_fp8(row)))
    if row.unit not in ("tok/s", "tok/s/GPU"):
        raise ValueError(f"unit '{row.unit}' of a decode row is not known; use tok/s or tok/s/GPU")
    rate = work.num_sequences * new / cost.seconds
    predicted = rate / row.num_gpus if row.unit.endswith("GPU") else rate
    return RowPrediction(row=row, predicted=predicted, cost=cost)


def fit_rows(model: ModelShape, layout: PointLayout, length: int, dtype: str, cluster: Cluster) -> int:
    """Returns how many rows' whole caches fit beside the parameters in nine tenths of the memory of all devices."""
    width, parts = BYTES[dtype], layout.tp * layout.pp
    room = 0.9 * cluster.memory_bytes * parts - model.num_params * width
    row = 2 * model.num_layers * model.num_kv_heads * model.head_dim * width * length
    if room < row:
        raise ValueError(
            f"{model.num_params / 1e9:.1f} billion parameters leave no room for a cache on {parts} devices"
        )
    return int(min(room // row, 2048)) * layout.dp


def _whole(text: str) -> int:
    if not text.isdigit():
        raise ValueError(f"length '{text}' of a train row is not a number of tokens")
    return int(text)


PREDICT = {"train": _predict_train, "decode": _predict_decode, "rlhf": predict_rlhf}


def describe_points(predictions: Sequence[RowPrediction]) -> str:
    """Returns a table of the rows, and the medians by kind. All of it is predicted, but for the column that is not."""
    heads = ("kind", "model", "gpus", "layout", "lengths", "unit", "measured", "predicted", "error")
    table = [heads, *(_cells(each) for each in predictions)]
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip() for cells in table]
    groups = defaultdict(list)
    for each in predictions:
        groups[each.row.kind, find_group(each.row)].append(abs(each.error))
    for (kind, group), errors in groups.items():
        lines.append(f"{kind} {group}: median error {median(errors):.1%}, worst {max(errors):.1%}, {len(errors)} rows")
    return "\n".join([*lines, *_describe_gains(predictions)])


@dataclass(frozen=True, kw_only=True)
class Gain:
    """How many times faster a searched row is than the row by rule of the same models, GPUs and lengths."""

    searched: RowPrediction
    measured: float
    predicted: float


def find_gains(predictions: Sequence[RowPrediction]) -> list[Gain]:
    """Returns the gain of every searched row whose rule's row is there too."""
    rules = {_step(each.row): each for each in predictions if find_group(each.row) == "heuristic"}
    pairs = [(each, rules.get(_step(each.row))) for each in predictions if find_group(each.row) == "searched"]
    return [
        Gain(searched=each, measured=rule.row.measured / each.row.measured, predicted=rule.predicted / each.predicted)
        for each, rule in pairs
        if rule is not None
    ]


def _step(row: Row) -> tuple[str, int, str]:
    return row.model, row.num_gpus, row.lengths


def _describe_gains(predictions: Sequence[RowPrediction]) -> list[str]:
    if not (gains := find_gains(predictions)):
        return []
    lines = ["gain of the searched plan over the rule's: measured, predicted; the plan where more is predicted"]
    for gain in gains:
        row = gain.searched.row
        lines.append(f"{row.model} on {row.num_gpus}, {row.lengths}: x{gain.measured:.2f}, x{gain.predicted:.2f}")
        if gain.predicted > gain.measured:
            lines += [f"  {line}" for line in gain.searched.plan.splitlines()]
    means = mean(gain.measured for gain in gains), mean(gain.predicted for gain in gains)
    return [*lines, "mean: x{:.2f}, x{:.2f}".format(*means)]


def find_group(row: Row) -> str:
    """Returns what a row is judged with: of rlhf, rows by rule and rows by search apart."""
    first = row.layout.split()[0]
    return first if row.kind == "rlhf" and first in ("heuristic", "searched") else "rows"


def _cells(each: RowPrediction) -> tuple[str, ...]:
    row = each.row
    numbers = (f"{row.measured:,.4g}", f"{each.predicted:,.4g}", f"{each.error:+.1%}")
    return (row.kind, row.model, f"{row.num_gpus} {row.gpu}", row.layout, row.lengths, row.unit, *numbers)


def with_cache(cluster: Cluster, is_small: bool) -> Cluster:
    """Returns a cluster whose programs keep caches in 8 bits, or as wide as activations."""
    return replace(cluster, factors={**cluster.factors, "small_cache": float(is_small)})
