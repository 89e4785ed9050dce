"""docs/architecture.svg shows the code of today."""

import xml.etree.ElementTree as ET

import pytest

from tools import sources
from tools.draw_house import HEIGHT, ROUTES, WIDTH, draw, find_places, read_house, read_picture

AGAIN = "docs/architecture.svg shows other code; draw it again with python -m tools.draw_house, and look at it"
# How far the numbers in the boxes may be off: not every line of code needs a new picture.
CLOSE = {"rel": 0.2, "abs": 2}


def test_the_picture_shows_the_folders_imports_and_paths_of_today():
    shown, house = read_picture(), read_house()
    assert (shown["imports"], shown["paths"]) == (house["imports"], house["paths"]), AGAIN
    assert shown["folders"].keys() == house["folders"].keys(), AGAIN
    for name, size in house["folders"].items():
        assert shown["folders"][name] == pytest.approx(size, **CLOSE), f"{name}: {AGAIN}"


def test_a_folder_stands_below_those_that_import_it_and_on_no_other():
    places = find_places(read_house())
    assert places.keys() == set(sources.list_packages())
    for source, target in sources.read_import_graph().edges:
        assert places[source][1] - places[target][1] > HEIGHT
    spots = sorted((y, x) for x, y in places.values())
    assert all(y0 != y1 or x1 - x0 > WIDTH for (y0, x0), (y1, x1) in zip(spots, spots[1:]))


def test_a_drawn_picture_holds_its_data_and_all_words(tmp_path):
    house, path = read_house(), tmp_path / "house.svg"
    draw(house, path)
    assert read_picture(path) == house
    texts = {node.text for node in ET.parse(path).iter("{http://www.w3.org/2000/svg}text")}
    assert texts >= house["folders"].keys()
    assert sum(":" in (text or "") for text in texts) == sum(len(route.stops) for route in ROUTES)


def test_a_stop_that_is_gone_is_named(monkeypatch):
    monkeypatch.setattr(sources, "resolves", lambda name: name != "realjax.hf.save:save_hf")
    with pytest.raises(ValueError, match="a path goes through realjax.hf.save:save_hf, which is not there"):
        read_house()
