"""Eight virtual CPU devices stand in for a node; compiled programs are kept between test processes."""

import gc
import os
import shutil
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

# Before jax starts: the backend reads these once.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "realjax-test-cache"))
# Programs of tests are tiny and run a few times: unoptimised, and with XLA's older code for fusions on CPUs, one that
# took seven seconds to compile takes under two. Commands that tests start inherit both.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["XLA_FLAGS"] = f"--xla_cpu_use_fusion_emitters=false {os.environ.get('XLA_FLAGS', '')}".strip()
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax  # noqa: E402
import pytest  # noqa: E402

from tests.given.commands import kept_log_settings  # noqa: E402
from tests.given.gpus import skip_without_gpu_compiler  # noqa: E402
from tests.given.models import quick_compiles  # noqa: E402
from tests.given.runs import Given, write_given  # noqa: E402


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collects without collecting garbage: what is imported stays, and is not looked through again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files with long tests first in each half, with which two workers begin: short ones are left to share."""
    is_long = lambda item: any(map(item.get_closest_marker, ("slow", "e2e")))
    files = list(dict.fromkeys(item.path for item in items if is_long(item)))
    quick = [item for item in items if item.path not in files]
    halves = [[item for item in items if item.path in files[start::2]] for start in range(2)]
    num = max(0, len(items) // 2 - len(halves[0]))
    items[:] = [*halves[0], *quick[:num], *halves[1], *quick[num:]]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    is_aot = item.get_closest_marker("aot") is not None
    # Budgets are of programs as users have them.
    jax.config.update("jax_disable_most_optimizations", not is_aot)
    if is_aot:
        skip_without_gpu_compiler()


@pytest.fixture(scope="session", autouse=True)
def eight_devices() -> None:
    assert jax.device_count() == 8, "tests need eight virtual CPU devices; unset JAX_NUM_CPU_DEVICES and JAX_PLATFORMS"


@pytest.fixture(scope="session")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    """Models and data that tests read and do not change."""
    return write_given(tmp_path_factory.mktemp("given"))


@pytest.fixture
def given_copy(given: Given, tmp_path: Path) -> Given:
    """The same in a folder of the test's own, to change it."""
    return Given(shutil.copytree(given.folder, tmp_path / "given"))


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """Compiles without most of XLA's optimisations: tiny programs that run a few times."""
    with quick_compiles():
        yield


@pytest.fixture(autouse=True)
def log_settings() -> Iterator[None]:
    with kept_log_settings():
        yield
