"""What programs on CPUs have freed stays for the next one, within bounds."""

import jax
import jax.numpy as jnp
import pytest

from realjax.engine import scratch
from realjax.engine.compiled import Compiled, CompileLog
from realjax.engine.scratch import HostScratch

MEMORY = 8000  # bytes of the process, of which an eighth may be kept


@pytest.fixture
def bounds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list to which each program's bound of what is kept is added."""
    found: list[int] = []
    monkeypatch.setattr(scratch, "give_back_beyond", found.append)
    monkeypatch.setattr(scratch, "total_bytes", lambda: MEMORY)
    return found


def test_what_is_kept_and_what_the_next_program_takes_are_an_eighth_together(bounds: list[int]) -> None:
    own = HostScratch()
    for needed in (100, 300, 5000):
        own.make_room(needed, ())
    assert bounds == [900, 700, 0]


def test_the_block_of_a_program_that_runs_again_is_kept_however_large(bounds: list[int]) -> None:
    own = HostScratch()
    for needed in (5000, 5000, 4000, 100):
        own.make_room(needed, ())
    assert bounds == [0, 5500, 0, 900]


def test_other_platforms_keep_nothing(bounds: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    HostScratch().make_room(5000, ())
    assert not bounds


def test_every_program_of_a_log_makes_room(bounds: list[int]) -> None:
    log = CompileLog()
    double, triple = (
        Compiled(name, fn, log) for name, fn in (("double", lambda x: 2 * x), ("triple", lambda x: 3 * x))
    )
    x = jnp.ones(25)  # its results take 100 bytes
    triple(double(x))
    assert bounds == [900, 900]
    assert log.of("train").scratch is log.scratch


def test_a_program_takes_as_much_on_each_device_of_its_process(bounds: list[int]) -> None:
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    x = jax.device_put(jnp.ones(50), jax.NamedSharding(mesh, jax.P("data")))  # 100 bytes on each of two devices
    Compiled("double", lambda x: 2 * x, CompileLog())(x)
    assert bounds == [800]
