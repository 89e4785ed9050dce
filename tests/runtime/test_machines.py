"""What a run that goes on on other devices is told of them."""

from realjax.runtime.machines import describe_move

BEFORE = {"processes": 2, "devices": 8, "layouts": {"gen": "d8p1m1 on 0-7", "train": "d2p1m2 on 0-3"}}


def test_a_run_on_the_same_devices_is_told_nothing():
    assert describe_move(BEFORE, BEFORE) is None
    assert describe_move({}, BEFORE) is None, "a save of an earlier version does not say"


def test_a_line_names_what_changed():
    now = {"processes": 1, "devices": 8, "layouts": BEFORE["layouts"] | {"gen": "d4p1m1 on 0-3"}}
    assert describe_move(BEFORE, now) == (
        "the run moves: 8 devices, 2 -> 1 processes, gen d8p1m1 on 0-7 -> d4p1m1 on 0-3; its batches stay, and its "
        "results are the same to rounding"
    )


def test_the_line_of_many_calls_is_short():
    layouts = {f"call{i}": "d1p1m1 on 0" for i in range(20)}
    now = {"processes": 2, "devices": 8, "layouts": dict.fromkeys(layouts, "d1p1m1 on 1")}
    assert ", and 12 more calls;" in str(describe_move({**BEFORE, "layouts": layouts}, now))
