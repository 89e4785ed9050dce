import os
import socket
import subprocess
import sys

import pytest

from tests.hf.tiny import make_checkpoint, tensors_of

# Two devices in each of two processes; the second run's parameters live wholly on process 1, and it must be the writer.
PROGRAM = """
import sys
import jax
port, process, source, out = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(process))
from realjax.core.axes import train_rules, tree_shardings
from realjax.core.layout import Layout, ParallelStrategy
from realjax.hf import files
from realjax.hf.load import load_config, load_params
from realjax.hf.save import save_hf
from realjax.models.build import build_model

sizes, read = [], files.SafetensorsFile.read

def counted(file, name, window):
    part = read(file, name, window)
    sizes.append(part.size)
    return part

files.SafetensorsFile.read = counted
model = build_model(load_config(source))
for name, devices in {"all": jax.devices(), "one": [d for d in jax.devices() if d.process_index == 1]}.items():
    sizes.clear()
    strategy = ParallelStrategy(pp=2, tp=len(devices) // 2)
    shardings = tree_shardings(model.axes, model.abstract, train_rules(strategy), Layout.of(strategy, devices))
    params = load_params(source, model, shardings)
    print("read", name, sum(sizes), flush=True)
    save_hf(params, model.config, f"{out}/{name}", source_dir=source, max_shard_bytes=20_000)
"""


@pytest.mark.slow
@pytest.mark.e2e
def test_two_processes_read_their_own_parts_and_write_one_checkpoint(tmp_path):
    source = make_checkpoint(tmp_path / "hf", "llama", dtype="bfloat16")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"}
    commands = [[sys.executable, "-c", PROGRAM, str(port), str(i), str(source), str(tmp_path)] for i in range(2)]
    children = [subprocess.Popen(c, env=env, stdout=subprocess.PIPE, text=True) for c in commands]
    try:
        outputs = [child.communicate(timeout=120)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0]
    total = sum(len(raw) // 2 for _, _, raw in tensors_of(source).values())
    read = [dict(line.split()[1:] for line in text.splitlines() if line.startswith("read")) for text in outputs]
    assert all(int(numbers["all"]) < 0.75 * total for numbers in read)
    assert (int(read[0]["one"]), int(read[1]["one"])) == (0, total)
    assert tensors_of(tmp_path / "all") == tensors_of(tmp_path / "one") == tensors_of(source)
