"""Clusters by name and by file."""

import json
from dataclasses import replace

import pytest

from realjax.allocation.cluster import FOLDER, Cluster, find_cluster
from realjax.allocation.measured import CollectivePoint, HeadPoint, LayerPoint, Measured, ProductPoint, UpdatePoint

LAYER = {"hidden_size": 8, "num_q_heads": 2, "num_kv_heads": 1, "head_dim": 4, "ffn_size": 16}
TABLES = Measured(
    products=(ProductPoint(dtype="float32", rows=4, inner=8, columns=16, seconds=0.5),),
    collectives=(CollectivePoint(kind="all_gather", span="within_node", num_devices=2, num_bytes=1024, seconds=0.25),),
    layers=(LayerPoint(use="decode", dtype="float32", tp=1, rows=2, tokens=64, seconds=0.125, **LAYER),),
    heads=(HeadPoint(use="nll", dtype="float32", tp=2, hidden_size=8, vocab_size=32, rows=2, tokens=64, seconds=0.5),),
    updates=(UpdatePoint(num_params=1000, seconds=0.25),),
)


@pytest.mark.parametrize("name", [path.stem for path in FOLDER.glob("*.json")])
def test_defaults_say_where_their_figures_are_from(name):
    cluster = find_cluster(name)
    assert (cluster.name, cluster.num_nodes) == (name, 1) and cluster.source


@pytest.mark.parametrize(
    ("text", "nodes", "per_node"),
    [("h100", 1, 8), ("h100x128", 16, 8), ("a100x4", 1, 4), ("h200x16", 2, 8), ("cpu", 1, 1), ("H100x8", 1, 8)],
)
def test_names_with_sizes(text, nodes, per_node):
    cluster = find_cluster(text)
    assert (cluster.num_nodes, cluster.devices_per_node) == (nodes, per_node)
    assert cluster.num_devices == nodes * per_node and cluster.name == text.lower()


def test_a_file_gives_back_what_was_written(tmp_path):
    cluster = replace(find_cluster("h100x16"), factors={"products": 0.5}, measured=TABLES)
    path = tmp_path / "cluster.json"
    path.write_text(cluster.to_json())
    assert find_cluster(str(path)) == cluster


def test_a_node_alone_needs_no_link_to_others():
    found = json.loads(find_cluster("h100").to_json())
    del found["between_nodes"]
    assert Cluster.from_json(json.dumps(found)) == replace(
        find_cluster("h100"), between_nodes=find_cluster("h100").within_node
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"between_nodes": None}, "between_nodes missing"),
        ({"within_node": None}, "within_node missing"),
        ({"to_host": {"bandwidth": 1e9}}, "to_host is .*latency"),
        ({"within_node": {"bandwidth": 0, "latency": 0}}, "within_node: bandwidth is 0"),
        ({"to_host": {"bandwidth": 1, "latency": -1}}, "latency is -1"),
        ({"devices_per_node": 0}, "devices_per_node is 0"),
        ({"num_nodes": 0}, "num_nodes is 0"),
        ({"matmul_flops": {}}, "matmul_flops"),
        ({"matmul_flops": {"bfloat16": -1}}, "matmul_flops of bfloat16 is -1"),
        ({"colour": "red"}, "unknown colour"),
        ({"measured": {"products": [{"rows": 1}]}}, "measured.products"),
        ({"measured": {"more": []}}, "tables"),
    ],
)
def test_a_file_that_lacks_something_is_refused(change, message):
    found = json.loads(find_cluster("h100x16").to_json())
    with pytest.raises(ValueError, match=f"mine.json.*{message}"):
        Cluster.from_json(json.dumps({**found, **change}), subject="mine.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h100x12", "12 devices, in nodes of 8; use a number from 1 to 8, or a multiple"),
        ("h100x0", "0 devices"),
        ("h300", "'h300' is not known; use a100, b200, cpu, h100, h200"),
        ("nowhere.json", "no file nowhere.json"),
    ],
)
def test_unknown_clusters_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        find_cluster(text)


def test_not_json_is_refused():
    with pytest.raises(ValueError, match="mine: not JSON"):
        Cluster.from_json("{", subject="mine")
    with pytest.raises(ValueError, match="a list, but a cluster"):
        Cluster.from_json("[]")
