"""Recipes by name, and the wheel that holds them."""

import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import yaml

from realjax.apps import plan, quickstart
from realjax.apps.quickstart import EXPERIMENTS
from tests.given.processes import ROOT


def run(capsys, *words):
    code = quickstart.main(list(words))
    return code, capsys.readouterr()


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_has_recipes_that_say_what_they_are_for(capsys, experiment):
    code, said = run(capsys, experiment, "--recipe")
    assert code == 0
    names = re.findall(r"^  (\S+)  +\w", said.out, re.M)
    assert experiment.replace("_", "-") in names
    assert all(len(line) <= 80 for line in said.out.splitlines())


def test_words_count_more_than_the_file_and_the_file_more_than_the_recipe(tmp_path, capsys):
    file = tmp_path / "ppo.yaml"
    # Another spelling than the recipe's of the first one, which is no contradiction.
    file.write_text("ppo: {max_new_tokens: 32, kl_ctl: 0.3}\n")
    words = ["ppo", "--recipe", "ppo-small", f"--config={file}", "ppo.kl_ctl=0.4", "--print-config"]
    code, said = run(capsys, *words)
    found = yaml.safe_load(said.out)
    assert code == 0 and found["experiment_name"] == "ppo-small" and found["dataset"]["train_bs_n_seqs"] == 64
    assert (found["ppo"]["gen"]["max_new_tokens"], found["ppo"]["kl_ctl"]) == (32, 0.4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ppo", "--recipe=ppo-smal"], "ppo has no recipe 'ppo-smal'; .* did you mean ppo-small"),
        (["ppo", "--recipe", "dapo"], "ppo has no recipe 'dapo'"),
        (["ppo", "--config"], "--config: nothing follows it"),
    ],
)
def test_what_is_no_recipe_is_refused_in_a_line(capsys, words, message):
    code, said = run(capsys, *words)
    assert code == 2 and re.search(message, said.err) and said.err.count("\n") == 1


def test_a_plan_reads_the_files_of_the_command_that_it_plans(given, tmp_path, capsys):
    file = tmp_path / "sft.yaml"
    file.write_text(f"model.path: {given.language_model}\ndataset: {{train_path: {given.rows}, train_bs_n_seqs: 4}}\n")
    for flags in (["--config", str(file)], ["--recipe=sft-small", f"--config={file}"]):
        assert plan.main(["--cluster", "h100x1", "sft", *flags, "dataset.max_seqlen=8"]) == 0
        assert "sft on h100x1" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.e2e
def test_a_wheel_holds_what_commands_need(tmp_path):
    source, out, installed = tmp_path / "source", tmp_path / "out", tmp_path / "installed"
    for name in ("realjax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(source)]
    subprocess.run([sys.executable, *build], check=True, capture_output=True)
    with zipfile.ZipFile(next(out.glob("realjax-*.whl"))) as wheel:
        wheel.extractall(installed)
    names = {path.relative_to(ROOT / "realjax") for path in (ROOT / "realjax").rglob("*.*") if path.suffix != ".pyc"}
    assert {name for name in names if not (installed / "realjax" / name).exists()} == set()
    assert not (installed / "tests").exists() and not (installed / "configs").exists()
    code = "import realjax, sys; print(realjax.__file__); from realjax.apps.command import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    for words in (["ppo", "--recipe", "ppo-small", "--print-config"], ["plan", "--help"], ["--help"]):
        command = [sys.executable, "-c", code, *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.startswith(str(installed)) and len(done.stdout.splitlines()) > 10
