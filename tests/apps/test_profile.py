"""`realjax profile` from its words to its file."""

import json

import pytest

from realjax.allocation.cluster import find_cluster
from realjax.apps import profile, quickstart
from realjax.apps.profile import find_tensor_sizes
from realjax.launch.accelerators import Accelerator
from realjax.options.parsing import parse_overrides
from realjax.options.profile import ProfileConfig
from tests.given.checkpoints import write_llama
from tests.given.commands import kept_log_settings
from tests.given.processes import start_process


def run(*words):
    with kept_log_settings():
        return quickstart.main(["profile", *words])


def test_a_model_is_measured_without_its_weights(tmp_path, capsys):
    model = write_llama(tmp_path / "model")
    (model / "model.safetensors").unlink()
    (tmp_path / "models.jsonl").write_text(json.dumps({"path": str(model)}) + "\n")
    output = tmp_path / "cluster.json"
    words = ["quick=True", "n_gpus_per_node=2", f"models_jsonl={tmp_path / 'models.jsonl'}", "handle_names=[inference]"]
    assert run(*words, f"output={output}", f"fileroot={tmp_path}", "name=here", "n_mbs=[1]") == 0
    cluster = find_cluster(str(output))
    assert (cluster.name, cluster.num_devices) == ("here", 2)
    assert {(p.use, p.tp, p.rows, p.tokens) for p in cluster.measured.layers} == {("forward", 1, 2, 64)}
    assert {p.use for p in cluster.measured.heads} == {"forward"} and len(cluster.measured.updates) == 2
    printed = capsys.readouterr().out
    assert "n_mbs has no effect here" in printed and f"written to {output}" in printed


def test_processes_profile_together(tmp_path):
    output, log = tmp_path / "cluster.json", tmp_path / "log"
    words = ["profile", "quick=True", f"models=[{write_llama(tmp_path / 'model')}]", "handle_names=[inference]"]
    words += ["model_parallel_sizes=[2]", f"output={output}", f"fileroot={tmp_path}"]
    command = ["-m", "launch.local", "--processes", "2", "--devices", "1", "--", *words]
    assert start_process(command, log, JAX_PLATFORMS="cpu").wait() == 0, log.read_text()
    cluster = find_cluster(str(output))
    assert cluster.num_devices == 2 and "2 process(es)" in cluster.source
    assert {p.tp for p in cluster.measured.layers} == {2}
    assert all(p.num_devices == 2 and p.seconds > 0 for p in cluster.measured.collectives)
    assert log.read_text().count("written to") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["models=[/no/such/model]"], "model path '/no/such/model' does not exist"),
        (["output=cluster.txt"], "output: found cluster.txt; it must be a path that ends in .json"),
        (["output=/no/such/folder/cluster.json"], "output: cannot write /no/such/folder/cluster.json"),
        (["n_gpus_per_node=2", "model_parallel_sizes=[4]"], "model_parallel_sizes: found 4, and the cluster has 2"),
        (["models_jsonl=/no/models.jsonl"], "models_jsonl"),
        (["seq_lens=[65]"], "seq_lens: found (65,); it must be multiples of 32"),
        (["batch_sizes=[]"], "batch_sizes: found (); it must be numbers of at least 1"),
        (["handle_names=[train]"], "handle_names"),
        (["tokens=[64]"], "tokens"),
    ],
)
def test_what_cannot_be_measured_is_a_line(words, message, monkeypatch, capsys):
    monkeypatch.setattr(profile, "prepare_devices", lambda *args: pytest.fail("no device is touched"))
    assert run(*words) == 2
    assert message in capsys.readouterr().err


def test_help_lists_the_options(capsys):
    assert run("--help") == 0
    assert "handle_names" in capsys.readouterr().out


def test_tensor_sizes_are_those_of_reals_rows_or_what_divides_a_machine(tmp_path, monkeypatch):
    rows = tmp_path / "allocations.jsonl"
    rows.write_text('{"data_parallel_size": 2, "model_parallel_size": 2, "pipeline_parallel_size": 1}\n')
    sizes = lambda *words: find_tensor_sizes(parse_overrides(ProfileConfig, words))
    assert sizes(f"allocations_jsonl={rows}", "n_gpus_per_node=4") == (2,)
    assert sizes("n_gpus_per_node=12") == (1, 2)
    monkeypatch.setattr(profile, "find_accelerator", lambda environ: Accelerator(name="H100", architecture="hopper"))
    assert sizes("n_gpus_per_node=12") == (1, 2, 4)
    assert sizes("quick=True") == (1,)
