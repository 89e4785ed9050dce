"""What runs predict of themselves beside what they measure: in plan, record, report and cluster.json."""

from dataclasses import replace

import pytest

from realjax.allocation.cluster import find_cluster
from realjax.allocation.run_prediction import kind_factor
from realjax.allocation.workload import Kind
from tests.given.commands import Trial

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick")]
CALLS: dict[str, dict[str, Kind]] = {
    "sft": {"trainDefault": "train"},
    "dpo": {"ref_inf": "inference", "actor_train": "train"},
    "grpo": {"actor_gen": "generate", "rew_inf": "inference", "ref_inf": "inference", "actor_train": "train"},
    "gen": {"generate": "generate"},
}


@pytest.fixture
def cluster_file(tmp_path):
    """A description of a machine of four devices, as a profile writes it."""
    file = tmp_path / "cluster.json"
    file.write_text(replace(find_cluster("cpu"), name="mine", devices_per_node=4).to_json())
    return file


@pytest.mark.parametrize("experiment", CALLS)
def test_predicted_and_measured_stand_side_by_side(experiment, given, tmp_path, cluster_file, capsys):
    trial = Trial(given=given, root=tmp_path, experiment=experiment)
    options = {"planner.cluster": cluster_file, "planner.update_cluster": True}
    if experiment == "sft":
        options["benchmark_steps"] = 3
    if experiment == "grpo":  # answers and prompts of one length: one shape, compiled in the first step
        options |= {"dataset.path": given.rows, "total_train_epochs": 3, "algo.gen.min_new_tokens": 8}
    assert trial.run(**options) == 0
    printed = capsys.readouterr().out
    calls = CALLS[experiment]
    for record in trial.metrics("train"):
        for call in calls:
            assert record[f"predicted/time/{call}"] > 0 and record[f"time/{call}"] > 0
            assert record[f"predicted/memory_mib/{call}"] > 0 and record[f"memory_mib/{call}"] > 0
        # On one device calls follow one another.
        parts = sum(record[f"predicted/time/{call}"] for call in calls)
        assert record["predicted/seconds"] == pytest.approx(parts)
    plan, end = printed.split(f"predicted by {cluster_file}")[0], printed.split("and measured: ")[1]
    assert plan.count("; predicted ") == len(calls)
    report = (trial.folder("logs") / "report.html").read_text()
    for call in (*calls, "step"):
        assert f"<td>{call}</td>" in report and f"{call}  " in end
    # The factors say how much longer calls took; the machine's own figures and its size stay.
    refined, before = find_cluster(str(cluster_file)), find_cluster("cpu")
    of_run = find_cluster(str(trial.folder("logs") / "cluster.json"))
    assert refined.factors == of_run.factors and set(refined.factors) == {kind_factor(kind) for kind in calls.values()}
    assert (refined.devices_per_node, of_run.devices_per_node) == (4, 1)
    assert refined.matmul_flops == before.matmul_flops


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"planner.cluster": "/no/cluster.json"}, "there is no file /no/cluster.json"),
        ({"planner.cluster": "abacus"}, "cluster: 'abacus' is not known"),
        ({"planner.update_cluster": True}, "set planner.cluster to a cluster.json"),
        (
            {"planner.cluster": "h100", "planner.update_cluster": True},
            "planner.cluster=h100, which is no file of yours",
        ),
    ],
)
def test_a_machine_that_is_not_described_is_told_before_the_run(options, message, given, tmp_path, capsys):
    assert Trial(given=given, root=tmp_path).run(**options) == 2
    assert message in capsys.readouterr().err
