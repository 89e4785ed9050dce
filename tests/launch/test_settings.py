"""Settings of XLA, CUDA and NCCL: which apply where, that the user's own stay, that the installed XLA knows them."""

import os
import subprocess
import sys

import pytest

from realjax.launch.accelerators import CORES, OTHER, UNKNOWN, Accelerator, find_cores
from realjax.launch.settings import DETERMINISTIC, RECOMMENDED, XLA_FLAGS, Environment, choose_environment
from tests.given.processes import ROOT

AMPERE = Accelerator(name="NVIDIA A100-SXM4-80GB", architecture="ampere")
HOPPER = Accelerator(name="NVIDIA H100 80GB HBM3", architecture="hopper")
OF_GPUS = [one for one in RECOMMENDED if one.architectures != {CORES}]
VARIABLES = [one for one in OF_GPUS if not one.is_flag]
FLAGS = " ".join(str(one) for one in OF_GPUS if one.is_flag)


def choose(
    environ: dict[str, str], accelerator: Accelerator | None = AMPERE, num_gpus: int = 8, **changes: bool
) -> Environment:
    options = {"recommend": True, "deterministic": False} | changes
    return choose_environment(environ, accelerator, num_gpus, **options)


def test_an_a100_gets_every_flag_and_variable_and_a_line_of_them():
    found = choose({"HOME": "home"})
    assert found.variables == {XLA_FLAGS: FLAGS} | {one.name: one.value for one in VARIABLES}
    (line,) = found.notices
    assert all(str(one) in line for one in OF_GPUS) and AMPERE.name in line


def test_the_users_own_flags_stay_before_ours_and_ours_of_the_same_name_is_left_out():
    (flag,) = (one for one in OF_GPUS if one.is_flag)
    assert choose({XLA_FLAGS: "--xla_dump_to=x"}).variables[XLA_FLAGS] == f"--xla_dump_to=x {flag}"
    found = choose({XLA_FLAGS: f"--{flag.name}=false --xla_dump_to=x"})
    assert XLA_FLAGS not in found.variables
    assert str(flag) not in found.notices[0] and f"{flag.name}=false" in found.notices[1]
    # A longer name is another flag.
    assert str(flag) in choose({XLA_FLAGS: f"--{flag.name}_too=false"}).variables[XLA_FLAGS]


@pytest.mark.parametrize(
    "name", [*(one.name for one in VARIABLES), *filter(None, (one.other_name for one in VARIABLES))]
)
def test_the_users_own_variables_stay_by_either_name(name):
    found = choose({name: "7"})
    assert name not in found.variables
    # Both names at once are an error of JAX.
    assert not [one for one in VARIABLES if name == one.other_name and one.name in found.variables]
    assert "=7" in found.notices[1]


def test_what_was_set_before_is_no_contradiction():
    first = choose({})
    again = choose(dict(first.variables))
    assert not again.variables and again.notices == first.notices


def test_flags_in_a_file_go_on_in_the_variable(tmp_path):
    path = tmp_path / "flags"
    path.write_text("--xla_dump_to=x\n--xla_dump_hlo_as_text\n")
    found = choose({XLA_FLAGS: str(path)})
    assert found.variables[XLA_FLAGS] == f"--xla_dump_to=x --xla_dump_hlo_as_text {FLAGS}"
    with pytest.raises(ValueError, match="XLA_FLAGS: .* is read as a file"):
        choose({XLA_FLAGS: str(tmp_path / "none")})


def test_an_unknown_gpu_gets_what_is_for_all():
    found = choose({}, Accelerator(name=UNKNOWN, architecture=OTHER))
    assert found.variables.keys() == {XLA_FLAGS} | {one.name for one in VARIABLES if one.architectures is None}


def test_where_cudnn_serves_attention_xla_keeps_its_passes():
    assert XLA_FLAGS not in choose({}, HOPPER).variables
    assert choose({}, HOPPER, deterministic=True).variables[XLA_FLAGS] == str(DETERMINISTIC)


def test_a_blackwell_keeps_its_many_connections():
    found = choose({}, Accelerator(name="NVIDIA B200", architecture="blackwell"))
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in found.variables


def test_a_process_of_one_gpu_launches_as_nccl_does():
    assert "NCCL_LAUNCH_MODE" in choose({}, num_gpus=2).variables
    assert "NCCL_LAUNCH_MODE" not in choose({}, num_gpus=1).variables


@pytest.mark.parametrize("recommend", [True, False])
@pytest.mark.parametrize("deterministic", [True, False])
def test_without_an_accelerator_nothing_is_set_or_said(recommend, deterministic):
    found = choose({XLA_FLAGS: "--xla_dump_to=x"}, None, recommend=recommend, deterministic=deterministic)
    assert found == Environment(variables={})


@pytest.mark.parametrize("deterministic", [True, False])
def test_virtual_devices_that_have_a_core_each_keep_to_it(deterministic):
    """Nothing that is for GPUs is said to them, and no line is printed."""
    cores = find_cores(num_devices=8, num_cores=2)
    found = choose({"HOME": "home"}, cores, deterministic=deterministic)
    assert found == Environment(variables={XLA_FLAGS: "--xla_cpu_multi_thread_eigen=false"})
    assert choose({}, cores, recommend=False) == Environment(variables={})
    own = {XLA_FLAGS: "--xla_cpu_multi_thread_eigen=true"}
    assert choose(own, cores).variables == {}


@pytest.mark.parametrize(("num_devices", "num_cores"), [(1, 2), (2, 4), (1, 1), (4, 1)])
def test_a_device_that_has_several_cores_or_all_there_is_works_on_them_as_xla_does(num_devices, num_cores):
    assert find_cores(num_devices, num_cores) is None


def test_determinism_is_set_with_and_without_the_recommended():
    assert choose({}, deterministic=True).variables[XLA_FLAGS] == f"{FLAGS} {DETERMINISTIC}"
    alone = choose({}, recommend=False, deterministic=True)
    assert alone.variables == {XLA_FLAGS: str(DETERMINISTIC)} and str(DETERMINISTIC) in alone.notices[0]
    assert choose({}, recommend=False) == Environment(variables={})


@pytest.mark.parametrize("value", ["", "=true", "=True", "=1"])
def test_determinism_that_was_asked_for_twice_is_no_contradiction(value):
    assert choose({XLA_FLAGS: f"--{DETERMINISTIC.name}{value}"}, deterministic=True).variables[XLA_FLAGS]


def test_determinism_against_the_users_flags_is_refused():
    with pytest.raises(ValueError, match="deterministic: found True, but XLA_FLAGS has"):
        choose({XLA_FLAGS: f"--{DETERMINISTIC.name}=false"}, deterministic=True)


def start_backend(flags: str) -> subprocess.CompletedProcess:
    """Sets flags after jax is imported and before its backend starts, as a run does, and returns how that ended."""
    code = f"import os, jax; os.environ['XLA_FLAGS'] = {flags!r}; print(jax.device_count())"
    env = {name: value for name, value in os.environ.items() if name != XLA_FLAGS} | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("setting", [one for one in (*RECOMMENDED, DETERMINISTIC) if one.is_flag], ids=str)
def test_the_installed_xla_knows_each_flag(setting):
    found = start_backend(str(setting))
    assert found.returncode == 0, found.stderr


def test_an_unknown_flag_would_have_been_noticed():
    found = start_backend("--xla_gpu_enable_what_nobody_knows=true")
    assert found.returncode != 0 and "xla_gpu_enable_what_nobody_knows" in found.stderr


def test_every_setting_stands_in_the_documentation():
    text = (ROOT / "docs" / "accelerators.md").read_text(encoding="utf-8")
    assert not [one for one in (*RECOMMENDED, DETERMINISTIC) if f"`{str(one).removeprefix('--')}`" not in text]
