"""Seconds of generation: prompts put into slots, and a token a row in every round until all answers have ended."""

import math

from realjax.allocation.choice import Choice
from realjax.allocation.cluster import Cluster
from realjax.allocation.memory import SHORTEST_CACHE, cache_length
from realjax.allocation.shapes import count_slots
from realjax.allocation.terms.collectives import Group, collective_seconds, find_groups
from realjax.allocation.terms.measured_layers import find_measured
from realjax.allocation.terms.messages import DRAWN, LOOP_SUMS, READS, small_seconds, woken_seconds
from realjax.allocation.terms.pass_cost import exchange_seconds
from realjax.allocation.terms.rates import LayerSplit, find_rates
from realjax.allocation.workload import CallWork, Lengths

CHUNK_LEN = 32  # rounds of a decode program, see `engine/slots.py`


def count_rounds(num_sequences: int, num_slots: int, answers: Lengths) -> float:
    """Returns the rounds in which every slot that runs draws a token, where a waiting prompt takes the place of an
    answer that has ended.

    Slots are full for (sequences / slots) x mean rounds. At the end they run empty: the longest answer outlasts the
    mean, and where all are as long, the last wave is not full.
    """
    waves = num_sequences / num_slots
    if waves <= 1:
        return answers.longest
    last = max(answers.longest - answers.mean, (math.ceil(waves) - waves) * answers.mean)
    return waves * answers.mean + last


def mean_context(work: CallWork, is_paged: bool) -> float:
    """Returns the cached tokens of a row that a round reads.

    Pages hold what is there. realjax reads the room it has: the next of 128, 256, 512 and so on, at most what the
    longest answer is given in the end, see `docs/generation.md`.
    """
    assert work.answers
    first, last = work.prompts.mean, work.prompts.mean + work.answers.mean
    if is_paged:
        # A longer answer is in its slot for longer.
        return first + work.answers.mean_square / work.answers.mean / 2
    first, last = float(work.prompts.longest), float(work.prompts.longest + work.answers.longest)
    most = cache_length(work.prompts.longest, work.most_new_tokens or work.answers.longest)
    total, at, room = 0.0, first, SHORTEST_CACHE
    while at < last:
        if (top := min(room, last)) > at:
            total, at = total + (top - at) * min(room, most), top
        room *= 2
    return total / (last - first)


def generate_terms(work: CallWork, choice: Choice, cluster: Cluster) -> dict[str, float]:
    """Returns the terms of a generate call: its rounds, of which the last are apart where the last answers go on in
    another layout, and the prompts."""
    assert work.answers
    slots = count_slots(work, choice)
    rounds, tail = count_rounds(work.num_sequences, slots, work.answers), choice.tail
    num_last = 0.0 if tail is None else min(rounds, count_last_rounds(work.num_sequences, slots, choice, work.answers))
    terms = _round_terms(work, choice, cluster, slots, rounds - num_last)
    if tail is not None and num_last:
        terms["tail"] = sum(_round_terms(work, tail, cluster, count_slots(work, tail), num_last).values())
        terms["tail_move"] = _tail_move_seconds(work, choice, tail, cluster)
    terms |= _prefill_terms(work, choice, cluster, slots)
    admissions = max(1, math.ceil(work.num_sequences / max(1, slots // 4)))
    num_chunks = math.ceil(rounds / CHUNK_LEN)
    terms["dispatch"] = cluster.dispatch_seconds * (admissions + num_chunks)
    terms["messages"] = _message_seconds(choice, cluster, rounds, admissions + num_chunks)
    return {name: seconds for name, seconds in terms.items() if seconds}


def _message_seconds(choice: Choice, cluster: Cluster, rounds: float, num_programs: float) -> float:
    """Returns seconds of the few bytes that rounds exchange and the host reads, see `terms.messages`."""
    groups = find_groups(choice, cluster.devices_per_node)
    sums = rounds * _sum_seconds(groups.data, cluster)
    reads = small_seconds(READS * num_programs, groups.data, cluster)
    return sums + reads + small_seconds(DRAWN * choice.strategy.pp * rounds, groups.vocab, cluster)


def _sum_seconds(group: Group, cluster: Cluster) -> float:
    """Returns how much longer a round takes where several devices have rows: as measured, of other numbers of devices
    as a ring takes, else its sum of a few bytes."""
    measured = next((point for point in cluster.measured.rounds if point.span == group.span), None)
    if measured is None or group.size == 1:
        return small_seconds(LOOP_SUMS, group, cluster)
    return measured.seconds * group.times_ring(measured.num_devices)


def count_last_rounds(num_sequences: int, num_slots: int, choice: Choice, answers: Lengths) -> float:
    """Returns the rounds after the answers that are left have gone on in the tail's slots.

    Lengths are taken to be spread so that a share (1 - t / longest)^a of them is longer than t, where a = longest /
    mean - 1 gives them their mean. Then n of N run for the last longest x (n / N)^(1 / a) rounds: none where all are as
    long. Of several waves the last ends as one does, in the rounds in which slots run empty. Since no part along `data`
    may have more than its k slots, the mean m of the parts is lower: m + sqrt(2 m ln parts) = k, as of the largest of
    so many Poisson numbers.
    """
    assert choice.tail_slots, "a tail has slots"
    exponent, num_rows = answers.longest / answers.mean - 1, min(num_sequences, num_slots)
    if exponent <= 0:
        return 0.0
    parts, spread = choice.strategy.dp, math.sqrt(2 * math.log(choice.strategy.dp))
    mean = ((math.sqrt(spread**2 + 4 * choice.tail_slots / parts) - spread) / 2) ** 2
    last = answers.longest * min(1.0, parts * mean / num_rows) ** (1 / exponent)
    return last if num_sequences <= num_slots else min(last, answers.longest - answers.mean)


def _tail_move_seconds(work: CallWork, choice: Choice, tail: Choice, cluster: Cluster) -> float:
    """Returns what it takes to go on in the tail's layout: each device cuts its new part of the parameters out of the
    one that it has, reading and writing that, and (f - 1) / f of its rows' keys and values go to the f - 1 others that
    share a layer with it from then on."""
    assert work.answers
    model, s = work.model, choice.strategy
    width = find_rates(cluster, work.dtype).itemsize
    params = 2 * model.num_params * width / tail.strategy.tp / cluster.memory_bandwidth
    length = work.prompts.longest + (work.most_new_tokens or work.answers.longest)
    of_row = 2 * model.num_kv_heads * model.head_dim * width * model.num_layers * model.mean_places(length)
    cache = count_slots(work, tail) / s.dp * of_row / s.tp
    group = find_groups(tail, cluster.devices_per_node).tensor
    return params + collective_seconds("all_to_all", cache, group, cluster) + 6 * cluster.dispatch_seconds


def _round_terms(work: CallWork, choice: Choice, cluster: Cluster, slots: int, rounds: float) -> dict[str, float]:
    """Returns the terms of rounds of P ticks, in which each of P stages takes a token of each row of a P-th of the
    slots through its layers."""
    s, rates, model = choice.strategy, find_rates(cluster, work.dtype), work.model
    groups, num_layers = find_groups(choice, cluster.devices_per_node), -(-model.num_layers // s.pp)
    rows, ticks = slots / (s.dp * s.pp), rounds * s.pp
    measured, context = find_measured(cluster, work.dtype), mean_context(work, bool(cluster.factor("paged", 0.0)))
    layer = rates.decode(model, rows, context, LayerSplit(s.tp, ep=choice.expert_shards))
    factor = measured.factor("decode", model, s.tp, rows)
    layer = factor.scale(layer)
    floor = max(0.0, rates.least_layer - layer.seconds)
    runs = num_layers * ticks
    terms = {
        "weights": runs * layer.products,
        "cache": runs * layer.attention,
        "memory": runs * layer.memory,
        "least": runs * floor,
        "head": ticks * rates.product(rows, model.hidden_size, model.vocab_size / (s.tp * s.pp)),
        "draw": ticks * rates.passes(DRAW_BYTES * rows * s.dp * model.vocab_size / s.size),
    }
    if (head := measured.head("decode", model, rows, s.tp)) is not None:
        terms |= {"head": ticks * head / s.pp, "draw": 0.0}
    size = rows * model.hidden_size * rates.itemsize
    collective = lambda kind, num_bytes, group: woken_seconds(kind, num_bytes, group, cluster)
    if s.tp > 1:
        reduce = collective("all_reduce", size, groups.tensor) + cluster.factor("call_seconds", 0.0)
        terms["tp"] = 2 * runs * factor.tensor * reduce
    if s.tp * s.pp > 1:
        # The rows of a table that the devices share, and logits to those that draw.
        logits = 4 * rows * model.vocab_size / (s.tp * s.pp)
        shared = collective("all_reduce", size, groups.vocab) + collective("all_to_all", logits, groups.vocab)
        terms["vocab"] = ticks * shared
    if s.pp > 1:
        # On to the next stage, and what the last one has made of its rows to all, which have a part of the head each.
        handed = collective("permute", size, groups.pipe) + cluster.factor("call_seconds", 0.0)
        terms["pp"] = ticks * (handed + collective("all_reduce", size, groups.pipe))
    if choice.expert_shards > 1:
        terms["ep"] = runs * exchange_seconds(size, choice, model, groups, cluster)
    return terms


# Float32 logits of a row, written, divided, and read by the search for the likeliest and by the softmax.
DRAW_BYTES = 4 * 5


def _prefill_terms(work: CallWork, choice: Choice, cluster: Cluster, slots: int) -> dict[str, float]:
    """Returns the prompts' forward passes: a quarter of the slots at a time, in P micro-batches of 2P - 1 ticks."""
    s, rates, model = choice.strategy, find_rates(cluster, work.dtype), work.model
    is_paged = bool(cluster.factor("paged", 0.0))
    length = work.prompts.mean if is_paged else work.prompts.longest
    admissions = math.ceil(work.num_sequences / max(1, slots // 4))
    prompts = work.num_sequences / (s.dp * s.pp * admissions)  # of a micro-batch
    tokens, split = prompts * length, LayerSplit(s.tp, ep=choice.expert_shards)
    squares = prompts * (work.prompts.mean_square if is_paged else length**2)
    layer = rates.forward(model, tokens, rates.squares(prompts, length, length, squares), split)
    factor = find_measured(cluster, work.dtype).factor("forward", model, s.tp, tokens)
    seconds = factor.scale(layer).seconds
    runs = -(-model.num_layers // s.pp) * admissions * (2 * s.pp - 1)
    terms = {"prefill": runs * max(seconds, rates.least_layer)}
    if s.tp > 1:
        group = find_groups(choice, cluster.devices_per_node).tensor
        size = tokens * model.hidden_size * rates.itemsize
        terms["prefill"] += 2 * runs * collective_seconds("all_reduce", size, group, cluster)
    return terms
