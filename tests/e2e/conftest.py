"""What whole runs in the test's own process need put back afterwards."""

import logging

import pytest

from tests.e2e.builders import Inputs, write_inputs


@pytest.fixture(autouse=True)
def log_settings():
    """Gives the logger back as it was: other tests read records where the command line sends none."""
    root = logging.getLogger("realjax")
    kept = root.handlers[:], root.level, root.propagate
    yield
    root.handlers[:], root.propagate = kept[0], kept[2]
    root.setLevel(kept[1])


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return write_inputs(tmp_path_factory.mktemp("inputs"))
