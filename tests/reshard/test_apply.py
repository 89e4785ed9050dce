from itertools import combinations

import jax
import numpy as np
import pytest

from realjax.core.trees import flatten_paths, map_paths
from realjax.reshard.apply import ema_update, on_host, reshard
from tests.reshard.cases import DTYPES, LAYOUTS, check_equal, make_host_tree, make_shardings, place

ROUTES = [("mixed", "second-half"), ("tensor8", "zero3"), ("single", "host"), ("host-half", "mixed-permuted")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["tied", "untied", "gqa", "moe"])
def test_there_and_back_between_all_pairs_of_layouts_is_bitwise(variant, dtype):
    host = make_host_tree(variant, DTYPES[dtype])
    shardings = {name: make_shardings(variant, name) for name in LAYOUTS}
    for here, there in combinations(LAYOUTS, 2):
        source = place(host, shardings[here])
        moved, _ = reshard(source, shardings[there])
        check_equal(moved, host, shardings[there])
        back, _ = reshard(moved, shardings[here])
        check_equal(back, host, shardings[here])
        check_equal(source, host, shardings[here])


@pytest.mark.parametrize(("here", "there"), ROUTES)
def test_sources_are_freed_when_asked(here, there):
    host, shardings = make_host_tree("gqa", DTYPES["float32"]), make_shardings("gqa", there)
    source = place(host, make_shardings("gqa", here))
    moved, _ = reshard(source, shardings, free_source=True)
    check_equal(moved, host, shardings)
    assert all(source["layers"][name].is_deleted() for name in ("q", "mlp", "k"))
    with pytest.raises(ValueError, match="reshard 'embed/kernel': the array is freed"):
        reshard(source, shardings)


def test_a_leaf_in_place_is_returned_itself():
    host, shardings = make_host_tree("tied", DTYPES["float32"]), make_shardings("tied", "mixed")
    source = place(host, shardings)
    for free_source in (False, True):
        moved, report = reshard(source, shardings, free_source=free_source)
        assert all(a is b for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(source)))
        assert report.bytes_moved == 0


def test_shards_in_place_are_shared_and_the_others_freed():
    layout = make_shardings("tied", "data8")["norm"].mesh
    sharding = jax.NamedSharding(layout, jax.P("data"))
    half = jax.NamedSharding(jax.sharding.Mesh(layout.devices[:, :4], layout.axis_names), jax.P())
    source = jax.device_put(np.arange(16.0), jax.NamedSharding(layout, jax.P()))
    pointers = {s.device: s.data.unsafe_buffer_pointer() for s in source.addressable_shards}
    moved, report = reshard({"w": source}, {"w": half}, free_source=True)
    assert all(s.data.unsafe_buffer_pointer() == pointers[s.device] for s in moved["w"].addressable_shards)
    assert report.bytes_moved == 0
    np.testing.assert_array_equal(moved["w"], np.arange(16.0))
    with pytest.raises(ValueError, match="'w': the array is freed"):
        reshard({"w": source}, {"w": sharding})


@pytest.mark.parametrize(("here", "there"), ROUTES)
def test_floats_are_cast_on_the_way(here, there):
    values = np.random.default_rng(0).normal(size=(8, 16, 8, 2)).astype(np.float32)
    source = place({"q": values}, {"q": make_shardings("tied", here)["layers"]["q"]})
    destination = {"q": make_shardings("tied", there)["layers"]["q"]}
    narrow, _ = reshard(source, destination, dtype=DTYPES["bfloat16"])
    check_equal(narrow, {"q": np.asarray(jax.numpy.asarray(values).astype("bfloat16"))}, destination)
    wide, _ = reshard(narrow, {"q": source["q"].sharding}, dtype=np.float32)
    check_equal(wide, {"q": np.asarray(narrow["q"], np.float32)}, {"q": source["q"].sharding})


def test_a_moved_tree_may_be_donated_though_replicas_share_memory():
    destination = make_shardings("tied", "data8")
    moved, _ = reshard(place(make_host_tree("tied", DTYPES["float32"]), make_shardings("tied", "tensor8")), destination)
    norm = np.asarray(moved["norm"])
    doubled = jax.jit(lambda x: x * 2, donate_argnums=0)(moved["norm"])
    for shard in doubled.addressable_shards:
        np.testing.assert_array_equal(shard.data, norm * 2)


def test_the_report_says_seconds_only_when_waited_for():
    source = place(make_host_tree("tied", DTYPES["float32"]), make_shardings("tied", "tensor8"))
    _, unwaited = reshard(source, make_shardings("tied", "pipe8"))
    _, waited = reshard(source, make_shardings("tied", "pipe8"), block=True)
    assert unwaited.seconds is None and waited.seconds > 0 and "GB/s" in str(waited)


def make_normal(seed: int, there: str):
    shapes = make_host_tree("gqa", DTYPES["float32"])
    rng = np.random.default_rng(seed)
    host = map_paths(lambda _, a: np.asarray(rng.normal(size=a.shape), np.float32), shapes)
    return host, place(host, make_shardings("gqa", there))


@pytest.mark.parametrize(("here", "there"), [*ROUTES, ("mixed", "mixed")])
def test_the_average_is_that_of_the_formula_in_the_layout_of_the_old_tree(here, there):
    old_host, old = make_normal(0, there)
    new_host, new = make_normal(1, here)
    mixed = flatten_paths(ema_update(old, new, 0.3))
    for path, wanted in flatten_paths(map_paths(lambda _, a, b: 0.7 * a + 0.3 * b, old_host, new_host)).items():
        np.testing.assert_allclose(mixed[path], wanted, rtol=1e-5, atol=1e-6)
        assert mixed[path].sharding == flatten_paths(make_shardings("gqa", there))[path]
    check_equal(new, new_host, make_shardings("gqa", here))


@pytest.mark.parametrize(("eta", "kept"), [(0.0, 0), (1.0, 1)])
def test_the_ends_of_the_average_are_bitwise_even_for_nans(eta, kept):
    hosts = [make_host_tree("gqa", DTYPES["float32"], seed) for seed in (0, 1)]
    shardings = make_shardings("gqa", "second-half")
    old, new = place(hosts[0], shardings), place(hosts[1], make_shardings("gqa", "mixed"))
    check_equal(ema_update(old, new, eta), hosts[kept], shardings)


def test_misuse_is_named():
    host, shardings = make_host_tree("tied", DTYPES["float32"]), make_shardings("tied", "mixed")
    tree = place(host, shardings)
    with pytest.raises(ValueError, match="'embed/kernel': found ndarray, needs a jax.Array"):
        reshard(host, shardings)
    with pytest.raises(ValueError, match="missing: .'layers/experts'"):
        reshard(place(make_host_tree("moe", DTYPES["float32"]), make_shardings("moe", "mixed")), shardings)
    with pytest.raises(ValueError, match="eta=1.5; it must lie in"):
        ema_update(tree, tree, 1.5)
    with pytest.raises(ValueError, match="source and destination are one array"):
        ema_update(tree, tree, 0.5)
    with pytest.raises(ValueError, match="chunk_bytes=0"):
        reshard(tree, on_host(shardings), chunk_bytes=0)
