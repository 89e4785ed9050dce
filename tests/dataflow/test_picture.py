"""A graph in words and as a picture."""

import re

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Annotation

from realjax.algorithms.sft import SFT_LOSS
from realjax.dataflow.graph import DataflowGraph, Train
from realjax.dataflow.picture import describe_graph, draw_graph
from tests.dataflow.test_graph import PPO

TRAIN = Train(name="train", role="default", inputs=("tokens", "loss_mask"), loss=SFT_LOSS)
ALONE = DataflowGraph((TRAIN,), frozenset({"tokens", "loss_mask"}))
GRAPHS = {"one call": ALONE, "ppo": PPO}


def test_the_text_names_calls_in_order_and_where_keys_come_from():
    assert describe_graph(ALONE) == ("train (train_step on default): tokens, loss_mask from dataset -> metrics")
    lines = describe_graph(PPO).splitlines()
    assert [line.split()[0] for line in lines] == [mfc.name for mfc in PPO.order]
    assert lines[0] == "actorGen (generate on actor): prompts from dataset -> tokens, logprobs"
    (train,) = (line for line in lines if line.startswith("actorTrain"))
    for source, target, keys in PPO.edges.edges(data="keys"):
        if target == "actorTrain":
            assert all(re.search(rf"\b{key}\b[^;]* from {source}\b", train) for key in keys)


@pytest.mark.parametrize("name", GRAPHS)
def test_the_picture_shows_calls_and_keys_from_left_to_right(tmp_path, monkeypatch, name):
    graph, figures, save = GRAPHS[name], [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), save(self, *args, **kw)))
    draw_graph(graph, tmp_path / "graph.png")
    assert imread(tmp_path / "graph.png").std() > 0.01
    (axes,) = figures[0].axes
    boxes = {text.get_text(): text.get_position() for text in axes.texts if text.get_bbox_patch()}
    places = {mfc.name: boxes[f"{mfc.name}\n{mfc.role}"] for mfc in graph.mfcs}
    assert len(boxes) == len(set(boxes.values())) == len(graph.mfcs)
    arrows = [(text.xyann, text.xy) for text in axes.texts if isinstance(text, Annotation)]
    labels = [text.get_text() for text in axes.texts if text.get_text() and text.get_text() not in boxes]
    assert sorted(arrows) == sorted((places[u], places[v]) for u, v in graph.edges.edges)
    assert sorted(labels) == sorted("\n".join(keys) for *_, keys in graph.edges.edges(data="keys"))
    assert all(places[u][0] < places[v][0] for u, v in graph.edges.edges)
