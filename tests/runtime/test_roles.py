from dataclasses import replace

import pytest

from realjax.core.layout import Layout, ParallelStrategy
from realjax.dataflow.run import RoleSpec
from realjax.runtime.roles import build_role
from tests.e2e.builders import write_llama


def test_attention_that_the_devices_cannot_compute_is_refused_before_anything_is_loaded(tmp_path):
    spec = RoleSpec(name="actor", path=write_llama(tmp_path / "llama"), attention="cudnn")
    with pytest.raises(ValueError, match=r"^role actor \(.*\): attention: found 'cudnn'; it needs a GPU, .*; use auto"):
        build_role(spec, Layout.of(ParallelStrategy()), 1)
    build_role(replace(spec, attention="xla"), Layout.of(ParallelStrategy()), 1)
