"""What the cost model says of calls, against sums by hand and properties that hold of any machine."""

import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from realjax.allocation.cluster import Cluster, Link
from realjax.allocation.cost import call_cost, fetch_cost, move_cost
from realjax.allocation.measured import HeadPoint, LayerPoint, Measured, UpdatePoint
from realjax.allocation.terms.decode_cost import count_rounds, mean_context
from realjax.allocation.terms.measured_layers import Point, fit_two, predict_line
from realjax.allocation.workload import Lengths, RoleWork
from realjax.core.layout import Layout
from realjax.reshard.plan import plan_reshard
from tests.given.llama_calls import H100S, LLAMA, choose, make_work

KINDS = ("train", "inference", "generate")
# Everything but products is free, and they run at their peak of 1 operation a second.
PRODUCTS = Cluster(
    name="products",
    num_nodes=1,
    devices_per_node=8,
    memory_bytes=2**40,
    matmul_flops={"bfloat16": 1.0},
    memory_bandwidth=1e30,
    within_node=Link(bandwidth=1e30, latency=0.0),
    between_nodes=Link(bandwidth=1e30, latency=0.0),
    to_host=Link(bandwidth=1e30, latency=0.0),
)


LAYOUTS = [{}, {"tp": 8, "sequence_parallel": True}, {"dp": 4, "pp": 2}, {"pp": 4, "tp": 4}, {"dp": 8, "zero_stage": 3}]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", LAYOUTS)
def test_terms_are_seconds_and_add_up(kind, sizes):
    cost = call_cost(make_work(kind), choose(**sizes), H100S)
    assert all(seconds > 0 for seconds in cost.terms.values())
    assert cost.seconds == pytest.approx(sum(cost.terms.values()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", LAYOUTS)
@pytest.mark.parametrize("better", ["memory_bandwidth", "matmul_flops", "within_node", "between_nodes"])
def test_a_better_machine_is_never_slower(kind, sizes, better):
    """By twice the rate or bandwidth; no term rises."""
    value = getattr(H100S, better)
    if isinstance(value, Link):
        value = replace(value, bandwidth=2 * value.bandwidth)
    else:
        value = {dtype: 2 * rate for dtype, rate in value.items()} if better == "matmul_flops" else 2 * value
    before = call_cost(make_work(kind), choose(first=4, **sizes), H100S)
    after = call_cost(make_work(kind), choose(first=4, **sizes), replace(H100S, name="better", **{better: value}))
    assert after.seconds <= before.seconds * (1 + 1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", LAYOUTS)
def test_more_tokens_are_never_faster(kind, sizes):
    work = make_work(kind)
    longer = replace(work, prompts=Lengths.all(2 * work.prompts.longest), pack_fn=lambda m: (-(-16 // m) * m, 4096))
    more = replace(work, num_sequences=128, pack_fn=lambda m: (-(-32 // m) * m, 2048))
    few, *many = (call_cost(one, choose(**sizes), H100S).seconds for one in (work, longer, more))
    assert all(seconds > few for seconds in many)


def test_training_multiplies_what_it_should():
    """Six operations for each parameter of the products and token, two more where layers are computed again, and
    7 x heads x head size x length for each token and layer, of which 2 are forward and 5 back, of causal attention."""
    tokens, work, attended = 16 * 2048, make_work("train"), 64 * 512**2 * 4096 * 32
    layers, head = 2 * LLAMA.num_layers * LLAMA.active_layer_params * tokens, 2 * LLAMA.head_params * tokens
    plain = call_cost(work, choose(), PRODUCTS).terms
    assert plain["products"] == pytest.approx(3 * layers) and plain["head"] == pytest.approx(3 * head)
    assert plain["attention"] == pytest.approx((2 + 5) * attended)
    again = call_cost(work, choose(remat=True), PRODUCTS)
    assert again.terms["remat"] == pytest.approx(layers + 2 * attended)
    inference = call_cost(make_work("inference"), choose(), PRODUCTS)
    assert inference.seconds == pytest.approx(layers + head + 2 * attended)


def test_attention_in_float32_looks_back_as_far_as_the_longest_sequence():
    """Rows of four sequences of 512: a query meets at most 512 keys before it, and half a block of 128 behind."""
    cluster = replace(PRODUCTS, name="wide", matmul_flops={"float32": 1.0})
    terms = call_cost(make_work("inference", dtype="float32"), choose(), cluster).terms
    scores = 16 * (2048 * 512 - 512**2 / 2 + 2048 * 128 / 2)
    assert terms["attention"] == pytest.approx(32 * 4 * 4096 * scores)


@pytest.mark.parametrize("sizes", [{"dp": 8}, {"tp": 8}, {"pp": 8}, {"pp": 2, "dp": 2, "tp": 2}])
def test_devices_share_the_products(sizes):
    """And stages wait for each other: P - 1 of M micro-batches."""
    one, terms = (call_cost(make_work("train"), choose(**s), PRODUCTS).terms for s in ({}, sizes))
    assert 8 * terms["products"] == pytest.approx(one["products"])
    pp = sizes.get("pp", 1)
    bubbles = terms.get("bubbles", 0.0)
    num_batches = next(n for n in range(2 * pp, 0, -1) if 16 // sizes.get("dp", 1) % n == 0) if pp > 1 else 1
    assert bubbles == pytest.approx((pp - 1) / num_batches * (terms["products"] + terms["attention"]))


def test_interleaving_divides_the_bubbles():
    plain, parted = (call_cost(make_work("train"), choose(pp=4, interleave=v), H100S).terms for v in (1, 4))
    assert 4 * parted["bubbles"] == pytest.approx(plain["bubbles"])


def test_what_the_model_multiplies_is_what_jax_multiplies():
    """The operations of a compiled forward pass of products of one layer and a head."""
    small = replace(LLAMA, hidden_size=64, num_q_heads=4, num_kv_heads=2, head_dim=16, ffn_size=96, vocab_size=128)
    small, tokens = replace(small, num_layers=1), 32
    shapes = [(64, 128), (64, 64), (64, 192), (96, 64), (64, 128)]
    count = 0.0
    for inner, columns in shapes:
        args = (jnp.ones((tokens, inner)), jnp.ones((inner, columns)))
        analysis = jax.jit(jnp.matmul).lower(*args).compile().cost_analysis()
        count += analysis["flops"]
    work = make_work("inference", model=small, num_sequences=1, prompts=Lengths.all(1), pack_fn=lambda m: (1, tokens))
    terms = call_cost(work, choose(), PRODUCTS).terms
    assert terms["products"] + terms["head"] == pytest.approx(count)


@pytest.mark.parametrize(
    ("sequences", "slots", "answers", "rounds"),
    [
        (64, 64, Lengths.all(100), 100),
        (64, 32, Lengths.all(100), 200),
        (65, 32, Lengths.all(100), 300),  # the last wave is nearly empty
        (64, 64, Lengths(mean=50, mean_square=3000, longest=100), 100),
        (640, 64, Lengths(mean=50, mean_square=3000, longest=100), 550),  # full for 500, then the longest ends
    ],
)
def test_rounds_until_all_answers_have_ended(sequences, slots, answers, rounds):
    assert count_rounds(sequences, slots, answers) == pytest.approx(rounds)


def test_the_room_that_a_round_reads():
    """Of 128 cached tokens to 512: as many in a room of 256 as of 128, and twice as many in one of 512."""
    work = make_work("generate")
    assert mean_context(work, is_paged=False) == pytest.approx((128 * 256 + 256 * 512) / 384)
    assert mean_context(work, is_paged=True) == pytest.approx(128 + 192)


def test_short_answers_are_given_more_room_than_they_fill():
    """Of 32 tokens after 32, each round reads the 128 that the shortest cache has."""
    short = replace(make_work("generate"), prompts=Lengths.all(32), answers=Lengths.all(32), most_new_tokens=32)
    assert mean_context(short, is_paged=False) == 128
    assert mean_context(short, is_paged=True) == pytest.approx(32 + 16)


def test_decoding_reads_weights_and_caches():
    """With free products, a round takes what its bytes take: all weights of layers, and the rooms of all rows."""
    memory = replace(PRODUCTS, name="memory", matmul_flops={"bfloat16": 1e30}, memory_bandwidth=1.0)
    terms = call_cost(make_work("generate", num_sequences=1), choose(), memory).terms
    weights = 2 * LLAMA.num_layers * LLAMA.active_layer_params
    cached = 2 * 2 * 32 * 4096 * mean_context(make_work("generate"), is_paged=False)
    assert terms["weights"] == pytest.approx(384 * weights, rel=1e-2)  # and a row's activations
    assert terms["cache"] == pytest.approx(384 * cached)


def test_a_window_bounds_what_a_round_reads_and_what_tokens_see():
    near = replace(LLAMA, windows=(100, None))
    decoded, trained = (
        [call_cost(make_work(kind, model=model), choose(), H100S).terms for model in (LLAMA, near)]
        for kind in ("generate", "train")
    )
    room = mean_context(make_work("generate"), is_paged=False)
    assert decoded[1]["cache"] == pytest.approx(decoded[0]["cache"] * (1 + 112 / room) / 2)
    assert trained[0]["attention"] / 2 < trained[1]["attention"] < trained[0]["attention"]


def test_stages_read_their_weights_once_for_every_wave():
    whole, staged = (call_cost(make_work("generate"), choose(**s), H100S).terms for s in ({}, {"pp": 4}))
    assert staged["weights"] == pytest.approx(whole["weights"], rel=0.2)


LAYER = {"hidden_size": 4096, "num_q_heads": 32, "num_kv_heads": 32, "head_dim": 128, "ffn_size": 11008}


@pytest.mark.parametrize(("kind", "use"), [("inference", "forward"), ("generate", "decode")])
def test_measured_layers_come_before_sums_of_parts(kind, use):
    work, terms = make_work(kind, num_sequences=16, prompts=Lengths.all(2048)), ("products", "attention", "memory")
    rows, tokens = (16, 2048) if kind == "inference" else (16, 2432)
    if kind == "generate":
        terms = ("weights", "cache", "memory")
    plain = call_cost(work, choose(), H100S).terms
    point = LayerPoint(use=use, dtype="bfloat16", tp=1, rows=rows, tokens=tokens, seconds=1.0, **LAYER)
    measured = call_cost(work, choose(), replace(H100S, name="m", measured=Measured(layers=(point,)))).terms
    factors = [measured[term] / plain[term] for term in terms]
    assert factors == pytest.approx([factors[0]] * 3) and factors[0] > 10
    if kind == "inference":
        assert sum(measured[term] for term in terms) == pytest.approx(32.0)


@pytest.mark.parametrize("seconds", [1e-9, 10.0])
def test_sums_over_tensor_take_no_less_than_by_themselves(seconds):
    """A measured layer of two devices that is slow is so in all its parts; one that is quick computes quickly."""
    work = make_work("inference", num_sequences=16, prompts=Lengths.all(2048))
    point = LayerPoint(use="forward", dtype="bfloat16", tp=2, rows=16, tokens=2048, seconds=seconds, **LAYER)
    measured = replace(H100S, name=f"layers of {seconds} s", measured=Measured(layers=(point,)))
    plain, found = (call_cost(work, choose(tp=2), cluster).terms for cluster in (H100S, measured))
    share = found["tp"] / plain["tp"]
    assert share == pytest.approx(max(1.0, found["products"] / plain["products"]))
    assert (share > 1) == (seconds > 1)


def test_measured_heads_and_updates_come_before_formulas():
    head = {"dtype": "bfloat16", "tp": 1, "hidden_size": 4096, "vocab_size": 32000, "rows": 16, "tokens": 2048}
    tables = Measured(
        heads=tuple(HeadPoint(use=use, seconds=s, **head) for use, s in (("forward", 1.0), ("backward", 2.0))),
        updates=(UpdatePoint(num_params=10**9, seconds=5.0),),
    )
    cluster = replace(H100S, name="heads", measured=tables)
    work = make_work("train", after=("other",), num_sequences=16, prompts=Lengths.all(2048))
    terms = call_cost(work, choose(), cluster).terms
    assert terms["head"] == pytest.approx(3.0, abs=1e-3)
    assert terms["optimizer"] == pytest.approx(5.0 * LLAMA.num_params / 1e9, rel=0.01)


def make_points(other: float, attention: float, *parts: tuple[float, float]) -> list[Point]:
    """Returns layers of sizes 100, 200, ... that take so many times as long as their parts."""
    return [Point(100.0 * i, a, b, other * a + attention * b) for i, (a, b) in enumerate(parts, start=1)]


def test_measured_layers_tell_attention_from_all_else():
    points = make_points(2.0, 5.0, (1.0, 0.1), (2.0, 0.8), (4.0, 0.4))
    assert fit_two(points, 200, pull=0.0) == pytest.approx((2.0, 5.0))
    # One length says nothing about attention apart; a factor below 0 is none.
    assert fit_two(make_points(3.0, 3.0, (1.0, 0.5)), 100) == pytest.approx((3.0, 3.0))
    assert fit_two(make_points(2.0, -1.0, (1.0, 0.1), (1.0, 0.4)), 100, pull=0.0)[1] == 0.0


def test_layers_of_about_the_same_size_count_most():
    points = [Point(100.0, 1.0, 0.1, 1.1), Point(10_000.0, 1.0, 0.1, 3.3)]
    near = [fit_two(points, size)[0] for size in (50.0, 100.0, 1000.0, 10_000.0, 10**6)]
    assert near == sorted(near) and near[0] == pytest.approx(1.0, rel=0.01) and near[-1] == pytest.approx(3.0, rel=0.01)
    assert predict_line([Point(10, 10, 1.0, 7.0), Point(20, 20, 1.0, 12.0)], 15) == pytest.approx(9.5)
    assert predict_line([Point(10, 10, 1.0, 7.0)], 20) == pytest.approx(14.0, rel=0.02)


@pytest.mark.parametrize("num_mbs", [1, 2])
def test_stages_send_what_compiled_programs_do(num_mbs):
    """As `tests/aot/test_budgets.py` counts it: M + 2 F permutes and 2 M + 2 F all-reduces; inference those of M, and F
    permutes."""
    work, choice = make_work("train"), choose(pp=2, num_mbs=num_mbs)
    unit = replace(H100S, name="unit", factors={}, within_node=Link(bandwidth=1.0, latency=0.0))
    hidden, M = 2 * 16 * 2048 * 4096, 4 * num_mbs  # bytes of all rows, in all micro-batches
    F, each = M + 1, hidden / M
    assert call_cost(work, choice, unit).terms["pp"] == pytest.approx((M + 2 * F + 2 * M + 2 * F) * each)
    F = num_mbs * (4 + 1)
    terms = call_cost(make_work("inference"), choice, unit).terms
    assert terms["pp"] == pytest.approx((F + 3 * M) * each)


def test_masters_are_copied_into_another_dtype_alone():
    cluster = replace(H100S, name="copies", matmul_flops={"bfloat16": 1e30, "float32": 1e30}, memory_bandwidth=1.0)
    cluster = replace(cluster, factors={})
    sizes = {
        dtype: call_cost(make_work("train", dtype=dtype), choose(), cluster).terms["optimizer"] / LLAMA.num_params
        for dtype in ("bfloat16", "float32")
    }
    assert sizes == pytest.approx({"bfloat16": 36 + 2, "float32": 36}, rel=0.01)


def test_a_dtype_without_a_rate_is_refused():
    with pytest.raises(ValueError, match="cluster h100x128: no rate for int4, only for bfloat16"):
        call_cost(make_work("train", dtype="int4"), choose(), H100S)


MOVES = [
    (choose(tp=8), choose(tp=8)),
    (choose(tp=8), choose(dp=8)),
    (choose(dp=8, zero_stage=3), choose(tp=8)),
    (choose(dp=2, tp=4), choose(pp=2, tp=4)),
    (choose(tp=4), choose(tp=4, first=4)),
    (choose(pp=2, dp=2, tp=2), choose(dp=2, tp=4)),
]


@pytest.mark.parametrize(("source", "destination"), MOVES)
def test_moves_are_those_of_the_reshard_plan(source, destination):
    """The busiest receiver of a table of layers, split as parameters are: `pipe`, zero's `data` and `tensor`."""
    shape, devices = (8, 8, 8), jax.devices()
    lay = lambda choice: Layout.of(choice.strategy, [devices[i] for i in choice.devices])
    spec = lambda choice: ("pipe", "data" if choice.strategy.zero_stage == 3 else None, "tensor")
    shardings = [lay(choice).sharding(*spec(choice)) for choice in (source, destination)]
    plan = plan_reshard({"w": jax.ShapeDtypeStruct(shape, jnp.bfloat16)}, {"w": shardings[0]}, {"w": shardings[1]})
    received = dict.fromkeys(devices, 0)
    for move in plan.leaves[0].moves:
        if move.source != move.destination:
            received[move.destination] += plan.leaves[0]._num_bytes(move)
    role = RoleWork(name="role", model=LLAMA, dtype="bfloat16")
    cluster = replace(H100S, name="links", factors={}, within_node=Link(bandwidth=1.0, latency=0.0))
    terms = move_cost(role, source, destination, cluster).terms
    share = max(received.values()) / (2 * 8**3)
    assert terms.get("within_node", 0.0) >= share * 2 * LLAMA.num_params * (1 - 1e-9)
    assert (share == 0) == ("within_node" not in terms)
    assert "between_nodes" not in terms


@pytest.mark.parametrize(("is_trained", "zero_stage", "share"), [(True, 0, 0), (True, 2, 0.5), (False, 0, 0)])
def test_masters_that_zero_splits_are_gathered_for_other_calls(is_trained, zero_stage, share):
    """On the same two devices: each lacks half of what the other one updates."""
    role = RoleWork(name="role", model=LLAMA, dtype="bfloat16", is_trained=is_trained)
    home, call = choose(dp=2, zero_stage=zero_stage), choose(dp=2)
    cluster = replace(H100S, name="gathers", factors={}, within_node=Link(bandwidth=1.0, latency=0.0))
    terms = move_cost(role, home, call, cluster).terms
    assert terms.get("within_node", 0.0) == pytest.approx(share * 2 * LLAMA.num_params)
    on_cpu = replace(cluster, name="in pieces", platform="cpu", within_node=Link(bandwidth=1e30, latency=1.0))
    assert move_cost(role, home, call, on_cpu).terms.get("within_node", 0.0) == pytest.approx(9 if share else 0)


def test_another_node_is_reached_by_its_own_link():
    role = RoleWork(name="role", model=LLAMA, dtype="bfloat16", is_trained=True)
    terms = move_cost(role, choose(tp=8), choose(tp=8, first=8), H100S).terms
    link, share = H100S.between_nodes, H100S.factor("links")
    bytes_each = 2 * LLAMA.num_params / 8
    assert terms["between_nodes"] == pytest.approx(link.latency + bytes_each / (share * link.bandwidth))
    assert terms["cast"] > 0 and "within_node" not in terms


def test_parameters_from_the_host_come_in_parts():
    role = RoleWork(name="role", model=LLAMA, dtype="bfloat16")
    one, eight = (fetch_cost(role, choose(tp=tp), H100S).terms["host"] for tp in (1, 8))
    latency = H100S.to_host.latency
    assert one - latency == pytest.approx(8 * (eight - latency))


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_is_weighed_quickly(kind):
    """A search weighs tens of thousands; the bound leaves room for busy machines."""
    work, choice = make_work(kind), choose(dp=4, pp=4, tp=8)
    call_cost(work, choice, H100S)
    start = time.process_time()
    for _ in range(200):
        call_cost(work, choice, H100S)
    assert (time.process_time() - start) / 200 < 1e-3
