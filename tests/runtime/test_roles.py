"""What a role cannot be on its devices is refused before its weights are read."""

from dataclasses import replace
from pathlib import Path

import jax
import pytest

from realjax.allocation.allocate import allocate
from realjax.core.compute import Compute
from realjax.runtime.roles import build_roles
from tests.given.specs import make_paths, make_role_spec, make_spec


def test_attention_that_the_devices_cannot_compute_is_refused_before_anything_is_loaded():
    role, spec = make_role_spec("default", Path("nowhere")), make_spec(make_paths(Path("nowhere")))
    plan = allocate(spec, jax.devices()[:1])
    with_attention = lambda name: replace(spec, roles={"default": replace(role, compute=Compute(attention=name))})
    with pytest.raises(
        ValueError, match=r"^role default \(.*\): attention: found 'cudnn'; it needs a GPU, .*; use auto"
    ):
        build_roles(with_attention("cudnn"), plan)
    build_roles(with_attention("xla"), plan)
