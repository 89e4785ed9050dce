"""Seconds of passes over rows: inference, and training with its gradients and updates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from realjax.allocation.choice import Choice
from realjax.allocation.cluster import Cluster
from realjax.allocation.measured import Collective, LayerUse
from realjax.allocation.terms.collectives import Group, Groups, collective_seconds, exposed, find_groups
from realjax.allocation.terms.measured_layers import Factor, MeasuredLayers, find_measured
from realjax.allocation.terms.messages import HEAD_SUMS, NORM_SUMS, count_kernels, count_layer_kernels, small_seconds
from realjax.allocation.terms.rates import Layer, LayerSplit, Rates, find_rates
from realjax.allocation.workload import CallWork, ModelShape


@dataclass(frozen=True, kw_only=True)
class Passes:
    """A pass over rows on one device: what it works on, and how often."""

    choice: Choice
    cluster: Cluster
    rates: Rates
    groups: Groups
    work: CallWork
    num_layers: int  # of a stage, empty ones among them
    row_len: float
    tokens: float  # of a micro-batch on a device
    squares: float  # of its sequences' lengths
    num_batches: int  # micro-batches of a pass or an update
    ticks: float  # that it takes as long as, bubbles among them

    @property
    def split(self) -> LayerSplit:
        s = self.choice.strategy
        return LayerSplit(s.tp, s.sequence_parallel, self.choice.expert_shards)

    @property
    def measured(self) -> MeasuredLayers:
        return find_measured(self.cluster, self.work.dtype)

    def factor(self, use: LayerUse) -> Factor:
        """Returns how much longer a layer takes than the sum of its parts."""
        return self.measured.factor(use, self.work.model, self.choice.strategy.tp, self.tokens)

    @property
    def hidden_bytes(self) -> float:
        """Of a micro-batch's hidden states, whole."""
        return self.tokens * self.work.model.hidden_size * self.rates.itemsize

    def collective(self, kind: Collective, num_bytes: float, group: Group) -> float:
        """Returns seconds of one collective."""
        return collective_seconds(kind, num_bytes, group, self.cluster)


def plan_passes(work: CallWork, choice: Choice, cluster: Cluster, *, is_train: bool) -> Passes:
    """Returns the passes of an update, or of an inference call.

    The micro-batches are those of `num_stage_batches` in `engine/pipeline.py`: up to two a stage of each of `num_mbs`
    parts. Training runs them all in one 1F1B schedule, whose M micro-batches take M + (P-1)/v ticks in P stages of v
    parts (arXiv:2104.04473); an inference pass runs a part at a time.
    """
    s, num_mbs = choice.strategy, choice.num_mbs
    rows, row_len = work.pack_fn(s.row_multiple * num_mbs)
    local = rows / s.dp / num_mbs
    per_part = _stage_batches(local, s.pp)
    bubbles = (s.pp - 1) / choice.interleave
    sequences = work.num_sequences * (work.passes / work.num_updates if is_train else 1)
    num_batches = num_mbs * per_part
    # Row length is not sequence length: attention goes by the squares of what lies in the rows.
    squares = sequences * work.lengths.mean_square / (s.dp * choice.context * num_batches)
    rates = find_rates(cluster, work.dtype)
    squares = rates.squares(local / per_part, row_len / choice.context, work.lengths.longest, squares)
    windows, tokens = work.model.windows, local / per_part * row_len / choice.context
    squares = sum(min(squares, 2 * tokens * window) if window else squares for window in windows) / len(windows)
    return Passes(
        choice=choice,
        cluster=cluster,
        rates=rates,
        groups=find_groups(choice, cluster.devices_per_node),
        work=work,
        num_layers=-(-work.model.num_layers // s.pp),
        row_len=row_len,
        tokens=tokens,
        squares=squares,
        num_batches=num_batches,
        ticks=num_batches + bubbles if is_train else num_mbs * (per_part + bubbles),
    )


def _stage_batches(num_rows: float, pp: int) -> int:
    """Returns the most micro-batches, up to two a stage, that a part's rows on a device divide into."""
    if pp == 1:
        return 1
    whole = max(1, round(num_rows))
    return next(n for n in range(2 * pp, 0, -1) if whole % n == 0)


def inference_terms(work: CallWork, choice: Choice, cluster: Cluster) -> dict[str, float]:
    """Returns the terms of an inference call: forward passes in stages, and the head."""
    passes = plan_passes(work, choice, cluster, is_train=False)
    rates, factor = passes.rates, passes.factor("forward")
    layer = rates.forward(work.model, passes.tokens, passes.squares, passes.split)
    layer = factor.scale(layer).at_least(rates.least_layer)
    terms = _layer_terms(passes, layer)
    terms["head"] = passes.num_batches * head_seconds(passes, ("forward",), num_products=1, num_reads=3)
    terms |= _tensor_terms(passes, gathers=2, scatters=2, reduces=2, factor=factor.tensor)
    terms |= (
        _pipe_terms(passes, is_train=False) | _context_terms(passes, layer, times=1) | _expert_terms(passes, times=1)
    )
    terms |= _shard_terms(passes, layer, gathers=1, scatters=0) | {"messages": _head_messages(passes)}
    return _finish(passes, terms, num_calls=1)


def train_terms(work: CallWork, choice: Choice, cluster: Cluster) -> dict[str, float]:
    """Returns the terms of a training call: passes there and back of all updates, gradients' sums, the optimizer."""
    passes = plan_passes(work, choice, cluster, is_train=True)
    rates, again = passes.rates, 1 if choice.remat else 0
    there, back = passes.factor("forward"), passes.factor("backward_remat" if again else "backward")
    plain = rates.forward(work.model, passes.tokens, passes.squares, passes.split)
    forward = there.scale(plain).at_least(rates.least_layer)
    both = forward + back.scale(rates.backward(work.model, plain)).at_least(2 * rates.least_layer)
    terms = _layer_terms(passes, both)
    if again:
        repeated = back.scale(plain).at_least(rates.least_layer)
        terms["remat"] = passes.num_layers * passes.num_batches * repeated.seconds
        terms["bubbles"] += passes.num_layers * (passes.ticks - passes.num_batches) * repeated.seconds
    # A call that needs no other's results learns by `nll`, whose gradients come with the forward pass.
    uses: tuple[LayerUse, ...] = ("forward", "backward") if work.after else ("nll",)
    terms["head"] = passes.num_batches * head_seconds(passes, uses, num_products=3, num_reads=6)
    factor = (2 * there.tensor + (2 + again) * back.tensor) / (4 + again)
    terms |= _tensor_terms(passes, gathers=4 + 2 * again, scatters=4 + again, reduces=4 + again, factor=factor)
    terms |= _pipe_terms(passes, is_train=True) | _context_terms(passes, both, times=3 + again)
    terms |= _expert_terms(passes, times=2 + again) | _shard_terms(passes, both, gathers=2, scatters=1)
    synced = _measured_sync(passes)
    terms["dp"] = _gradient_seconds(passes) if synced is None else synced
    # By how much a part's update is quicker is in a measured step.
    terms["optimizer"] = _optimizer_seconds(passes, is_whole=synced is not None)
    terms["messages"] = _head_messages(passes) + small_seconds(NORM_SUMS, passes.groups.vocab, cluster)
    return _finish(passes, terms, num_calls=work.num_updates)


def _layer_terms(passes: Passes, layer: Layer) -> dict[str, float]:
    """Returns the stage's layers over all micro-batches, and the ticks in which it has none."""
    runs, bubbles = passes.num_layers * passes.num_batches, passes.ticks - passes.num_batches
    return {
        "products": runs * layer.products,
        "attention": runs * layer.attention,
        "memory": runs * layer.memory,
        "bubbles": passes.num_layers * bubbles * layer.seconds,
    }


def head_seconds(passes: Passes, uses: Sequence[LayerUse], *, num_products: int, num_reads: int) -> float:
    """Returns the head over a micro-batch, with the vocabulary split over tensor and pipe: measured for such uses, else
    its products, and float32 logits that are written once and read by maximum, sum and gradients."""
    work, s = passes.work, passes.choice.strategy
    if not work.scores_vocab:
        return 0.0
    found = [passes.measured.head(use, work.model, passes.tokens, s.tp) for use in uses]
    if all(seconds is not None for seconds in found):
        return sum(filter(None, found)) / s.pp
    columns = work.model.vocab_size / (s.tp * s.pp)
    product = passes.rates.product(passes.tokens, work.model.hidden_size, columns)
    return num_products * product + num_reads * passes.rates.passes(4 * passes.tokens * columns)


def _tensor_terms(passes: Passes, *, gathers: int, scatters: int, reduces: int, factor: float) -> dict[str, float]:
    """Returns collectives over `tensor`: each layer gathers and scatters its hidden states with sequence parallelism,
    else it all-reduces them; `tests/aot/test_budgets.py` counts the same in compiled programs."""
    s, runs = passes.choice.strategy, passes.num_layers * passes.ticks
    if s.tp == 1:
        return {}
    share = factor * (1 - passes.cluster.factor("tensor_overlap", 0.0))
    size = passes.hidden_bytes
    if not s.sequence_parallel:
        return {
            "tp": share * (runs * reduces + passes.ticks) * passes.collective("all_reduce", size, passes.groups.tensor)
        }
    gather, scatter = (passes.collective(kind, size, passes.groups.tensor) for kind in ("all_gather", "reduce_scatter"))
    return {"tp": share * (gather * (runs * gathers + passes.ticks) + scatter * (runs * scatters + passes.ticks))}


def _pipe_terms(passes: Passes, *, is_train: bool) -> dict[str, float]:
    """Returns what goes between stages, of whose vocabulary each has a part.

    Training: F ticks hand hidden states on and gradients back, v times with v parts a stage; M micro-batches go back
    to the first stage for the head; the embedded rows (F), what comes out (M) and the gradients of both go to all.
    Inference embeds and reads out all micro-batches of a part at once. `tests/aot/test_budgets.py` counts the same.
    """
    s = passes.choice.strategy
    if s.pp == 1:
        return {}
    size = passes.hidden_bytes / (s.tp if s.sequence_parallel else 1)
    on = passes.choice.interleave * passes.collective("permute", size, passes.groups.pipe)
    if is_train:
        first = passes.collective("permute", size, passes.groups.pipe)
        to_all = passes.collective("all_reduce", size, passes.groups.pipe)
        return {
            "pp": passes.ticks * 2 * on + passes.num_batches * first + 2 * (passes.ticks + passes.num_batches) * to_all
        }
    num_parts = passes.choice.num_mbs
    whole = size * passes.num_batches / num_parts
    first = passes.collective("permute", whole, passes.groups.pipe)
    to_all = passes.collective("all_reduce", whole, passes.groups.pipe)
    return {"pp": passes.ticks * on + num_parts * (first + 2 * to_all)}


def _context_terms(passes: Passes, layer: Layer, *, times: int) -> dict[str, float]:
    """Returns ring attention's keys and values (arXiv:2310.01889), which attention partly hides."""
    cp, tp, model = passes.choice.context, passes.choice.strategy.tp, passes.work.model
    if cp == 1:
        return {}
    size = 2 * passes.tokens * max(model.num_kv_heads / tp, 1) * model.head_dim * passes.rates.itemsize
    seconds = times * passes.collective("all_gather", cp * size, passes.groups.context)
    hidden = exposed(seconds, layer.attention, passes.cluster.factor("overlap", 0.0))
    return {"cp": passes.num_layers * passes.ticks * hidden}


def _expert_terms(passes: Passes, *, times: int) -> dict[str, float]:
    """Returns the exchange of tokens between devices that share experts, there and back."""
    if passes.choice.expert_shards == 1:
        return {}
    seconds = exchange_seconds(passes.hidden_bytes, passes.choice, passes.work.model, passes.groups, passes.cluster)
    return {"ep": passes.num_layers * passes.ticks * times * seconds}


def exchange_seconds(size: float, choice: Choice, model: ModelShape, groups: Groups, cluster: Cluster) -> float:
    """Returns seconds in which a device's hidden states of `size` bytes come to their experts, and what these make of
    them comes back: realjax gathers the states of all devices that share experts (`engine/experts.py`), others send a
    copy to each of a token's experts."""
    if choice.strategy.ep == 1:
        return 2 * collective_seconds("all_to_all", size * model.experts_per_token, groups.experts, cluster)
    gathered = size * choice.strategy.ep
    kinds: tuple[Collective, ...] = ("all_gather", "all_to_all")
    return sum(collective_seconds(kind, gathered, groups.experts, cluster) for kind in kinds)


def _shard_terms(passes: Passes, layer: Layer, *, gathers: int, scatters: int) -> dict[str, float]:
    """Returns what ZeRO's third stage gathers and scatters: a layer's parameters in every pass, its float32 gradients
    in every micro-batch, behind what is computed meanwhile."""
    s, model = passes.choice.strategy, passes.work.model
    if s.zero_stage < 3 or passes.groups.data.size == 1:
        return {}
    num_kernels, parts = count_layer_kernels(model), _split_experts(passes, model.layer_params / s.tp, 1)
    layers = sum(_exchange(passes, *part, num_kernels, gathers=gathers, sums=scatters) for part in parts)
    hidden = exposed(layers, layer.seconds, passes.cluster.factor("overlap", 0.0))
    # The head's and the first layer's have nothing to hide behind.
    outer = _exchange(passes, model.head_params / (s.tp * s.pp), passes.groups.data, 1, gathers=1, sums=scatters)
    return {"zero": passes.ticks * (passes.num_layers * hidden + outer)}


def _exchange(passes: Passes, size: float, group: Group, num_kernels: int, *, gathers: int, sums: int) -> float:
    """Returns seconds in which so many parameters are gathered in the compute dtype and their float32 gradients summed:
    all-reduced without ZeRO, else scattered.

    XLA makes one message of all kernels, and reduce-scatters, for accelerators alone; on CPUs each kernel's gradient is
    all-reduced, of which each device keeps its part.
    """
    is_cpu = passes.cluster.platform == "cpu"
    num = num_kernels if is_cpu else 1
    kind = "all_reduce" if is_cpu or passes.choice.strategy.zero_stage == 0 else "reduce_scatter"
    gathered = passes.collective("all_gather", passes.rates.weight_bytes * size / num, group)
    return num * (gathers * gathered + sums * passes.collective(kind, 4 * size / num, group))


def _stage_params(passes: Passes) -> list[tuple[float, Group]]:
    """Returns parameters of a device before ZeRO splits them, and the devices that have the same: experts apart where
    they are shared."""
    s, model = passes.choice.strategy, passes.work.model
    outer = (model.num_params - model.num_layers * model.layer_params) / (s.tp * s.pp)
    return _split_experts(passes, passes.num_layers * model.layer_params / s.tp + outer, passes.num_layers)


def _split_experts(passes: Passes, size: float, num_layers: int) -> list[tuple[float, Group]]:
    """Returns parameters, those of so many layers' experts among them, in parts as devices share them."""
    choice, model, groups = passes.choice, passes.work.model, passes.groups
    if choice.expert_shards == 1:
        return [(size, groups.data)]
    experts = num_layers * model.sparse_share * model.num_experts * model.expert_params / choice.strategy.tp
    return [(size - experts, groups.data), (experts / choice.expert_shards, groups.replicas)]


def _gradient_seconds(passes: Passes) -> float:
    """Returns the sum over `data` once an update, with ZeRO's stages 1 and 2 the parameters gathered too; the third's
    are in `_shard_terms`."""
    zero_stage, num_kernels = passes.choice.strategy.zero_stage, count_kernels(passes.work.model)
    if zero_stage == 3:
        return 0.0
    gathers = 1 if zero_stage else 0
    return sum(_exchange(passes, *part, num_kernels, gathers=gathers, sums=1) for part in _stage_params(passes))


def _measured_sync(passes: Passes) -> float | None:
    """Returns what steps on several devices were measured to take longer; None where none were."""
    parts, choice = _stage_params(passes), passes.choice
    if passes.groups.data.size == 1 or len(parts) > 1:
        return None
    return passes.measured.sync(parts[0][0], choice.strategy.zero_stage, passes.groups.data)


def _head_messages(passes: Passes) -> float:
    """Returns the small sums of a head whose vocabulary stages share; measured heads have those over tensor."""
    if passes.choice.strategy.pp == 1 or not passes.work.scores_vocab:
        return 0.0
    return small_seconds(HEAD_SUMS * passes.num_batches, passes.groups.vocab, passes.cluster)


def _optimizer_seconds(passes: Passes, *, is_whole: bool) -> float:
    """Returns an update's passes over memory: Adam reads and writes masters, two moments and gradients (32 bytes), the
    norm reads gradients (4), a compute copy is written unless it is in the masters' own dtype (2); every further
    micro-batch adds its gradients (12). `is_whole` is as if ZeRO split nothing."""
    zero_stage, parts, width = passes.choice.strategy.zero_stage, _stage_params(passes), passes.rates.weight_bytes
    size = sum(size for size, _ in parts)
    own = sum(size / group.size for size, group in parts) if zero_stage and not is_whole else size
    summed = own if zero_stage == 3 else size
    copied = width * size if width < MASTER_BYTES else 0.0
    added = passes.rates.passes(12 * summed * (passes.num_batches - 1) + copied)
    measured = passes.measured.update(own)
    return added + (passes.rates.passes(36 * own) if measured is None else measured)


MASTER_BYTES = 4  # of a parameter that is trained


def _finish(passes: Passes, terms: Mapping[str, float], num_calls: int) -> dict[str, float]:
    """Returns the terms of all updates, with what it takes to start their programs."""
    scaled = {name: num_calls * seconds for name, seconds in terms.items() if seconds}
    return scaled | {"dispatch": num_calls * passes.cluster.dispatch_seconds}
