"""The quickstart's first command, word for word, and what it leaves."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.given.commands import Given, Trial
from tests.given.compare import without_clocks
from tests.given.processes import HANG_SECONDS, start_process
from tests.options.test_config_dict import RECIPE
from tests.options.test_parsing import QUICKSTART_SFT

pytestmark = pytest.mark.e2e
STEPS = 9  # 8 epochs of 520 rows, 512 at a time
STAMP = r"\d{8}-\d\d:\d\d:\d\d\.\d{3}"


@dataclass(frozen=True)
class Quickstart(Trial):
    """The quickstart's run; its experiment has its own name."""

    output: str

    def folder(self, kind: str) -> Path:
        return super().folder(kind).parents[1] / "quickstart-sft" / "release"


@pytest.fixture(scope="module")
def run(given: Given, tmp_path_factory: pytest.TempPathFactory) -> Quickstart:
    root = tmp_path_factory.mktemp("quickstart")
    paths = {
        "model.path": given.language_model,
        "dataset.train_path": given.train,
        "dataset.valid_path": given.valid,
    }
    words = [f"{name}={paths.get(name, value)}" for name, value in (word.split("=") for word in QUICKSTART_SFT)]
    log = root / "log"
    process = start_process(["-m", "realjax.apps.quickstart", "sft", *words], log, REALJAX_FILEROOT=str(root))
    assert process.wait(HANG_SECONDS) == 0, log.read_text()
    return Quickstart(given=given, root=root, options={}, output=log.read_text())


def test_the_console_says_what_the_quickstart_shows(run):
    lines = run.output.splitlines()
    for line, text in zip(
        lines,
        (
            "Running sft experiment.",
            f"Logs will be dumped to {run.folder('logs')}",
            f"Model checkpoints will be saved to {run.folder('checkpoints')}",
            "No accelerator found: 8 virtual CPU devices stand in.",
        ),
        strict=False,
    ):
        assert re.fullmatch(rf"{STAMP} quickstart INFO: {re.escape(text)}", line)
    assert "d4p1m2+sp+zero2 on 0-7" in run.output
    steps = re.findall(
        rf"^{STAMP} \w+ INFO: Epoch (\d)/8 step (\d)/2 \(global step (\d)\): loss [\d.]+, ppl [\d.]+, "
        r"lr \S+, grad_norm [\d.]+, [\d,]+ tokens/s \(all\), .*[\d.]+ s(?:, ETA \d:\d\d:\d\d)?$",
        run.output,
        re.MULTILINE,
    )
    assert [int(step) for _, _, step in steps] == list(range(1, STEPS + 1))
    assert [int(epoch) for epoch, _, _ in steps] == sorted(int(epoch) for epoch, _, _ in steps)
    assert "programs compiled: 2 in" in run.output


def test_the_files_are_where_they_belong(run):
    logs, checkpoints = run.folder("logs"), run.folder("checkpoints")
    for name in ("config.json", "metrics.jsonl", "report.html", "curves/loss.png", "curves/ppl.png"):
        assert (logs / name).stat().st_size > 0
    assert list((logs / "tensorboard").glob("events.*"))
    (saved,) = (checkpoints / "default").iterdir()
    assert re.fullmatch(rf"epoch8epochstep\dglobalstep{STEPS}", saved.name)
    kept = {"config.json", "manifest.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in saved.iterdir()} == kept
    assert [path.name for path in run.folder("recover").iterdir()] == [str(STEPS)]


def test_every_epoch_ends_in_an_evaluation(run):
    evaluated = {record["step"]: record["loss"] for record in run.metrics() if record["kind"] == "eval"}
    assert list(evaluated) == [0, *range(2, STEPS + 1)]
    assert run.steps() == list(range(1, STEPS + 1))
    assert evaluated[STEPS] < evaluated[0]


def test_the_checkpoint_loads_in_transformers_and_generates(run):
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (saved,) = (run.folder("checkpoints") / "default").iterdir()
    tokenizer = AutoTokenizer.from_pretrained(saved)
    model, report = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not any(report.values())
    prompt = tokenizer("the film was", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert written.shape[1] == prompt["input_ids"].shape[1] + 5


def test_the_recipe_takes_the_same_steps(run):
    flags = [f"--config.{word}" for word in Trial.words(run) if re.match(r"(model|dataset)\.\w*path=", word)]
    flags += [f"--config.dataset.valid_path={run.given.valid}", "--config.exp_ctrl.benchmark_steps=3"]
    log, root = run.root / "recipe.log", run.root / "recipe"
    process = start_process(["-m", "launch.main", f"--config={RECIPE}", *flags], log, REALJAX_FILEROOT=str(root))
    assert process.wait(HANG_SECONDS) == 0, log.read_text()
    recipe = Quickstart(given=run.given, root=root, options={}, output=log.read_text())
    found, expected = without_clocks(recipe.metrics()), without_clocks(run.metrics())
    assert recipe.steps() == [1, 2, 3]
    assert found == expected[: len(found)]
