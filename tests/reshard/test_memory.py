import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.given.processes import HANG_SECONDS
from tools.bench.reshard import PAIRS

BENCH = Path(__file__).parents[2] / "tools" / "bench" / "reshard.py"


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize(
    ("pair", "method"),
    [
        (("m8", "p8"), "reshard"),
        (("d8 zero3", "d2p2m2"), "reshard"),
        (("m8", "p2m2 on 0-3"), "reshard"),
        (("m8 host", "p2m2 on 0-3"), "reshard"),
        (("m8", "m8 permuted"), "exchange"),
    ],
)
def test_the_peak_stays_within_the_destination_and_a_half(pair, method):
    arguments = ["--mebibytes", "512", "--pair", str(PAIRS.index(pair)), "--method", method]
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    child = subprocess.run(
        [sys.executable, str(BENCH), *arguments], env=env, capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert child.returncode == 0, child.stderr
    figures = json.loads(child.stdout)
    assert figures["peak"] <= 1.5 * figures["destination"]
