"""Predicted beside measured: what is collected, and how it is told."""

import pytest

from realjax.record.forecast import Forecast
from realjax.record.report import section_html

PREDICTED = {"time/a": 2.0, "memory_mib/a": 100.0, "time/b": 1.0, "memory_mib/b": 50.0, "seconds": 3.0}


def test_medians_of_steps_stand_beside_what_was_predicted():
    forecast = Forecast(PREDICTED, "a guess")
    for seconds in (4.0, 5.0, 100.0):
        forecast.add({"time/a": seconds, "memory_mib/a": 80.0, "time/b": 1.0, "memory_mib/b": 50.0, "loss": 1.0})
    assert forecast.measured() == {"time/a": 5.0, "memory_mib/a": 80.0, "time/b": 1.0, "memory_mib/b": 50.0}
    assert forecast.rows() == [
        ("a", "2.000", "5.000", "-60%", "100", "80", "+25%"),
        ("b", "1.000", "1.000", "+0%", "50", "50", "+0%"),
        ("step", "3.000", "", "", "", "", ""),
    ]
    assert forecast.metrics()["predicted/time/a"] == 2.0
    assert "Predicted by a guess, and measured: medians of 3 steps" in forecast.text()
    assert "<td>-60%</td>" in section_html(forecast.section())


def test_nothing_is_measured_where_every_step_compiled():
    forecast = Forecast(PREDICTED, "a guess")
    assert forecast.measured() == {} and "no step without compiling" in forecast.title
    assert forecast.rows()[0] == ("a", "2.000", "", "", "100", "", "")
    assert forecast.metrics() == {f"predicted/{name}": pytest.approx(value) for name, value in PREDICTED.items()}
