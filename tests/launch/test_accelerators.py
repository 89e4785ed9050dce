"""The kind of GPU is told from the driver's files and the environment, without a backend."""

from pathlib import Path

import pytest

from realjax.launch import accelerators
from realjax.launch.accelerators import OTHER, UNKNOWN, Accelerator, count_accelerators, find_accelerator


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX's plugin for GPUs is there, as on a GPU machine."""
    monkeypatch.setattr(accelerators, "_has_plugin", lambda: True)


def write_driver(root: Path, *models: str) -> Path:
    for i, model in enumerate(models):
        folder = root / "proc/driver/nvidia/gpus" / f"0000:{i:02x}:00.0"
        folder.mkdir(parents=True)
        (folder / "information").write_text(f"Model: \t\t {model}\nIRQ:   \t\t 187\nGPU UUID: \t GPU-0\n")
    return root


@pytest.mark.parametrize(
    ("model", "architecture"),
    [
        ("NVIDIA H100 80GB HBM3", "hopper"),
        ("NVIDIA H200", "hopper"),
        ("NVIDIA GH200 480GB", "hopper"),
        ("NVIDIA A100-SXM4-80GB", "ampere"),
        ("NVIDIA B200", "blackwell"),
        ("NVIDIA GB200", "blackwell"),
        ("NVIDIA L40S", OTHER),
        ("NVIDIA GeForce RTX 4090", OTHER),
    ],
)
def test_the_architecture_follows_from_the_drivers_name(tmp_path, model, architecture):
    found = find_accelerator({}, write_driver(tmp_path, model, model))
    assert found == Accelerator(name=model, architecture=architecture)


@pytest.mark.parametrize(
    "environ",
    [
        {"JAX_PLATFORMS": "cpu"},
        {"JAX_PLATFORMS": "tpu,cpu"},
        {"CUDA_VISIBLE_DEVICES": ""},
        {"CUDA_VISIBLE_DEVICES": "-1"},
    ],
)
def test_hidden_gpus_are_none(tmp_path, environ):
    assert find_accelerator(environ, write_driver(tmp_path, "NVIDIA H200")) is None


@pytest.mark.parametrize(
    "environ", [{"JAX_PLATFORMS": "cuda,cpu"}, {"CUDA_VISIBLE_DEVICES": "0,1"}, {"JAX_PLATFORMS": ""}]
)
def test_gpus_that_are_asked_for_are_found(tmp_path, environ):
    assert find_accelerator(environ, write_driver(tmp_path, "NVIDIA H200")) is not None


def test_gpus_without_a_plugin_are_none(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerators, "_has_plugin", lambda: False)
    assert find_accelerator({}, write_driver(tmp_path, "NVIDIA H200")) is None


def test_without_a_driver_there_is_none(tmp_path):
    assert find_accelerator({}, tmp_path) is None


@pytest.mark.parametrize("sign", ["proc/driver/nvidia", "dev/nvidiactl", "dev/dxg"])
def test_a_gpu_whose_name_is_hidden_is_one_of_no_known_architecture(tmp_path, sign):
    (tmp_path / sign).mkdir(parents=True)
    assert find_accelerator({}, tmp_path) == Accelerator(name=UNKNOWN, architecture=OTHER)


def test_different_gpus_have_no_architecture_in_common(tmp_path):
    found = find_accelerator({}, write_driver(tmp_path, "NVIDIA H200", "NVIDIA A100-SXM4-80GB"))
    assert found == Accelerator(name=UNKNOWN, architecture=OTHER)


def test_gpus_are_counted_as_the_environment_shows_them(tmp_path):
    root = write_driver(tmp_path, *["NVIDIA H100"] * 8)
    assert count_accelerators({}, root=root) == 8
    assert count_accelerators({"CUDA_VISIBLE_DEVICES": "2,3,5"}, root=root) == 3
    assert count_accelerators({"JAX_PLATFORMS": "cpu"}, root=root) == 0
    # Slurm may show each of four processes its two, or all of them all eight.
    assert count_accelerators({"CUDA_VISIBLE_DEVICES": "0,1"}, 4, root) == 8
    assert count_accelerators({"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, 4, root) == 8


def test_gpus_without_the_drivers_list_are_counted_by_their_devices(tmp_path):
    (tmp_path / "dev").mkdir()
    for name in ("nvidiactl", "nvidia0", "nvidia1", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    assert count_accelerators({}, root=tmp_path) == 2
