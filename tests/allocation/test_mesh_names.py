"""Names of nodes and device meshes."""

import re

import pytest

from realjax.allocation.mesh_names import default_nodes, expand_nodes, parse_device_mesh

NODES = ("NODE01", "NODE02", "NODE03", "COM08")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("NODE01", ["NODE01"]),
        ("NODE01,NODE02", ["NODE01", "NODE02"]),
        ("NODE[01-02]", ["NODE01", "NODE02"]),
        ("NODE[01,11,13-14]", ["NODE01", "NODE11", "NODE13", "NODE14"]),
        ("NODE[01-02,03,07],COM08", ["NODE01", "NODE02", "NODE03", "NODE07", "COM08"]),
        ("COM08,gpu-a[8-11],x.y", ["COM08", "gpu-a8", "gpu-a9", "gpu-a10", "gpu-a11", "x.y"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("n[3-3]", ["n3"]),
    ],
)
def test_lists_of_nodes(text, names):
    assert expand_nodes(text, "nodelist") == names


@pytest.mark.parametrize(
    "text",
    ["", ",", "NODE01,", "NODE[]", "NODE[01-02", "NODE01]", "NODE[02-01]", "NODE[a-b]", "NODE[01-]", "NODE[01]x"]
    + ["[01-02]x", "NODE[[01]]", "NODE01, NODE02", "NODE01,NODE01", "NODE[01-03,02]", "a:b"],
)
def test_other_texts_are_no_lists(text):
    with pytest.raises(ValueError, match=r"^nodelist: "):
        expand_nodes(text, "nodelist")


@pytest.mark.parametrize("per_node", [1, 2, 8, 16])
def test_whole_nodes_are_all_their_devices(per_node):
    parse = lambda text: parse_device_mesh(text, nodes=NODES, num_devices_per_node=per_node, subject="mesh")
    for i, node in enumerate(NODES):
        assert parse(node) == tuple(range(i * per_node, (i + 1) * per_node))
    assert parse("NODE[01-03],COM08") == tuple(range(4 * per_node))
    assert parse("COM08,NODE02") == parse("COM08") + parse("NODE02")


def test_a_part_of_a_node():
    parse = lambda text, per_node: parse_device_mesh(text, nodes=NODES, num_devices_per_node=per_node, subject="mesh")
    assert parse("NODE01:0,1,2,3", 8) == (0, 1, 2, 3)
    assert parse("NODE03:2,3", 4) == (10, 11)
    assert parse("COM08:15", 16) == (63,)
    assert parse("NODE02:1,0", 2) == (3, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("NODE07", "no node NODE07 in this run; its nodes are NODE01, NODE02, NODE03, COM08"),
        ("NODE[03-05]", "no node NODE04, NODE05 in this run"),
        ("NODE01:4", "'NODE01:4' needs different device numbers below n_gpus_per_node=4"),
        ("NODE01:1,1", "'NODE01:1,1' needs different device numbers"),
        ("NODE[01-02]:0,1", "a part of a node is written NODE01:0,1,2,3, and only of one node"),
        ("NODE01:", "a part of a node is written"),
        ("NODE01:0-3", "a part of a node is written"),
        ("NODE01:0,1,", "a part of a node is written"),
        (":0", "it needs node names such as"),
    ],
)
def test_meshes_that_cannot_be_are_refused(text, message):
    with pytest.raises(ValueError, match=f"^ref_inf.device_mesh: .*{re.escape(message)}"):
        parse_device_mesh(text, nodes=NODES, num_devices_per_node=4, subject="ref_inf.device_mesh")


@pytest.mark.parametrize("num_nodes", [1, 2, 9, 12])
def test_default_names_are_reals(num_nodes):
    names = default_nodes(num_nodes)
    assert names[0] == "NODE01"
    assert names == expand_nodes(f"NODE[01-{num_nodes:02d}]", "nodelist")


@pytest.mark.parametrize("text", ["NODE[1-999999999]", "NODE[0-65536]", f"NODE[1-{'9' * 5000}]"])
def test_a_range_is_measured_before_it_is_spelled_out(text):
    with pytest.raises(ValueError, match="^nodelist: .* (names more than 65536 nodes|has no numbers or ranges)"):
        expand_nodes(text, "nodelist")
