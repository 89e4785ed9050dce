"""The report in a real browser, where one is installed: nothing is refused, and nothing is wider than the window."""

import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from realjax.record.metrics import MetricsWriter
from realjax.record.report import ReportParts, Section, write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"),
)
LONG = "a_word_without_a_place_to_break_it_" * 6
NARROW, WIDE, HEIGHT = 500, 1400, 3000  # headless Chromium's windows are no narrower
LIGHT, DARK = (255, 255, 255), (17, 24, 39)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    with MetricsWriter(run_dir) as writer:
        for step in range(1, 9):
            writer.write(step, {"loss": 1 / step, "lr": 1e-5 * step, "tokens_per_second": 1e5 / step, LONG: step})
    rows = (("a prompt", LONG, "an answer of several words, which go on in the next line"),)
    parts = ReportParts(
        title=f"experiment / {LONG}",
        summary={"checkpoints": f"/{LONG}"},
        sections=[
            Section(title=f"Samples of {LONG}", columns=("prompt", "before", "after"), rows=rows, comes_first=True),
            Section(title="Text", kind="text", text=LONG),
        ],
    )
    return write_report(run_dir, parts)


@pytest.mark.parametrize("width", [NARROW, WIDE])
@pytest.mark.parametrize("is_dark", [False, True])
def test_a_report_is_shown_within_the_window(report, tmp_path, width, is_dark):
    picture = tmp_path / "page.png"
    color = ["--blink-settings=preferredColorScheme=0"] if is_dark else []
    command = [
        *(str(BROWSER), *FLAGS, *color, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},{HEIGHT}"),
        *(f"--screenshot={picture}", report.as_uri()),
    ]
    log = subprocess.run(command, capture_output=True, text=True, timeout=120).stderr
    assert "CONSOLE" not in log and "Refused" not in log, log
    page = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert page.shape[1] == width
    background = np.array(DARK if is_dark else LIGHT)
    is_empty = (abs(page - background) <= 2).all(axis=-1)
    # The margins of the body are empty from top to bottom; what was too wide would run over the right one.
    assert is_empty[:, :20].all() and is_empty[:, -20:].all()
    assert 0.02 < 1 - is_empty.mean() < 0.9
