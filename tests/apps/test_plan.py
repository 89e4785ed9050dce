"""`realjax plan`: what it prints, and how it refuses."""

import dataclasses
import json
import shutil

import pytest

from realjax.apps import quickstart
from realjax.apps.plan import build_spec
from realjax.apps.quickstart import EXPERIMENTS
from realjax.options.parsing import parse_overrides
from realjax.options.supervised import DPOConfig
from tests.given.runs import make_options, make_rl_options


def words(options: dict) -> list[str]:
    return [f"{name}={value}" for name, value in options.items() if name not in ("allocation_mode", "n_gpus_per_node")]


def test_a_plan_beside_those_of_rules(given, tmp_path, capsys):
    file, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    command = ["plan", "ppo", *words(make_rl_options(given, tmp_path)), "--cluster", "h100x8"]
    more = ["--json", str(file), "--picture", str(picture), "--explain", "actor_train"]
    assert quickstart.main([*command, *more]) == 0
    found, text = json.loads(file.read_text()), capsys.readouterr().out
    assert picture.stat().st_size > 1000
    single = {name for name in found["plans"] if name.startswith("all ")}
    assert len(single) > 1
    rules = {"heuristic", "pipe_model", "pipe_data", "best single layout"} - set(found["problems"])
    assert set(found["plans"]) == {"search"} | rules | single
    best = found["plans"]["best single layout"]["predicted_seconds"]
    assert best == min(found["plans"][name]["predicted_seconds"] for name in single)
    assert min(found["gains"].values()) >= 1, "the search is no worse than any of them"
    assert "(predicted)" in text and "actor_train" in text and "optimizer" in text
    first = found["plans"]["search"]
    assert quickstart.main([*command, *more]) == 0
    assert json.loads(file.read_text())["plans"]["search"] == first, "the same seed finds the same plan"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_is_planned(experiment, given, tmp_path, capsys):
    options = make_options(experiment, given, tmp_path)
    command = ["plan", experiment, *words(options), "planner.evaluations=300", "--cluster", "h100x8"]
    assert quickstart.main(command) == 0
    text = capsys.readouterr().out
    assert f"{experiment} on h100x8" in text and "a step (predicted)" in text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--cluster", "h100x0"], "0 devices"),
        (["--cluster", "abacus"], "cluster: 'abacus' is not known"),
        (["--cluster", "cluster.json"], "there is no file cluster.json"),
        (["--explain", "nothing"], "--explain: found 'nothing'; the calls are"),
    ],
)
def test_what_cannot_be_is_one_line(given, tmp_path, capsys, more, message):
    assert quickstart.main(["plan", "sft", *words(make_options("sft", given, tmp_path)), *more]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


def test_adapters_are_planned_without_weights(given, tmp_path):
    """A reference is its actor's base then too, as it is in the run that is planned."""
    model = shutil.copytree(given.language_model, tmp_path / "model")
    (model / "model.safetensors").unlink()
    options = make_options("dpo", given, tmp_path, actor__path=model, ref__path=model)
    lora = parse_overrides(DPOConfig, [*words(options), "actor.lora=4"])
    roles = build_spec("dpo", lora).roles
    assert roles["actor"].base is not None and roles["ref"].base == roles["actor"].base
    random = dataclasses.replace(lora, actor=dataclasses.replace(lora.actor, init_from_scratch=True))
    with pytest.raises(ValueError, match=r"^actor\.lora\.rank: there is an adapter with init_from_scratch=True"):
        build_spec("dpo", random)


def test_help_names_the_command(capsys):
    quickstart.main(["--help"])
    assert "plan " in capsys.readouterr().out


def test_published_rows_are_predicted_and_their_plans_shown(tmp_path, capsys):
    file = tmp_path / "points.csv"
    file.write_text(
        "kind,model,gpus,gpu,layout,batch,seq_or_prompt+gen,measured,unit,source\n"
        "train,Llama2-7B,8,H100,fsdp8,16,4096,0.721,s/step,a page\n"
        "rlhf,7B x4,8,H100,searched,256,128+384,28.0,s/step,a figure\n"
        "rlhf,7B x4,8,H100,heuristic tp8,256,128+384,29.0,s/step,a figure\n"
    )
    assert quickstart.main(["plan", "--points", str(file)]) == 0
    text = capsys.readouterr().out
    assert "train rows: median error" in text and "actor_gen" in text and "mean: x1.04, x" in text
