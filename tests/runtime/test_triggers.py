"""Frequencies fire when they say."""

from realjax.data.loader import Position
from realjax.dataflow.run import Frequency
from realjax.runtime import triggers
from realjax.runtime.triggers import Trigger


def positions(steps_per_epoch: int, num_epochs: int) -> list[Position]:
    total = steps_per_epoch * num_epochs
    return [
        Position(
            epoch=i // steps_per_epoch + 1,
            epoch_step=i % steps_per_epoch + 1,
            global_step=i + 1,
            ends_epoch=(i + 1) % steps_per_epoch == 0,
        )
        for i in range(total)
    ]


def fired_steps(frequency: Frequency) -> list[int]:
    trigger = Trigger(frequency)
    return [position.global_step for position in positions(4, 3) if trigger.fires(position)]


def test_each_frequency_fires_by_itself_and_together_they_add_up():
    assert fired_steps(Frequency()) == []
    assert fired_steps(Frequency(epochs=1)) == [4, 8, 12]
    assert fired_steps(Frequency(epochs=2)) == [8]
    assert fired_steps(Frequency(steps=5)) == [5, 10]
    assert fired_steps(Frequency(epochs=1, steps=5)) == [4, 5, 8, 10, 12]


def test_seconds_are_counted_from_the_last_time_they_fired(monkeypatch):
    now = 100.0
    monkeypatch.setattr(triggers.time, "monotonic", lambda: now)
    trigger = Trigger(Frequency(secs=10))
    fired = []
    for position in positions(4, 3):
        now += 4.0
        if trigger.fires(position):
            fired.append(position.global_step)
    assert fired == [3, 6, 9, 12]
