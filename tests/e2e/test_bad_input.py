"""What a user can get wrong stops the command in seconds, with one line, and leaves nothing behind."""

import json
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.given.checkpoints import write_llama
from tests.given.commands import Given, Trial, stopped_after
from tests.given.processes import HANG_SECONDS, start_process

SECONDS = 20  # of processor time: a clock on the wall would measure what else the machine does
ROW = '{"prompt": "a film", "answer": " good"}\n'
OPTIONS = {
    "allocation_mode": "manual",
    "n_gpus_per_node": 4,
    "allocation.parallel.data_parallel_size": 2,
    "allocation.parallel.model_parallel_size": 2,
    "dataset.train_bs_n_seqs": 16,
}
TENSOR_8 = {
    "n_gpus_per_node": 8,
    "allocation__parallel__data_parallel_size": 1,
    "allocation__parallel__model_parallel_size": 8,
}


@pytest.fixture
def trial(given: Given, tmp_path: Path) -> Trial:
    return Trial(given=given, root=tmp_path / "root", options=OPTIONS)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def llama(folder: Path, **config) -> Path:
    return write_llama(folder / "model", **config)


def without_weights(folder: Path) -> Path:
    model = llama(folder)
    (model / "model.safetensors").unlink()
    return model


def torn_weights(folder: Path) -> Path:
    weights = llama(folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return weights.parent


def without_tokenizer(folder: Path) -> Path:
    model = llama(folder)
    for file in model.glob("tokenizer*"):
        file.unlink()
    return model


def other_architecture(folder: Path) -> Path:
    model = llama(folder)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "mamba", "architectures": ["Mamba"]}))
    return model


# Each makes the one option that is wrong, and says what the message must hold.
MODELS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing path": (lambda folder: folder / "none", r"model path '.*none' does not exist; give"),
    "not a model": (lambda folder: folder, r"model path '.*' is not a HuggingFace model: it has no config.json"),
    "a file": (lambda folder: write(folder / "model.bin", ""), r"model path '.*' is a file; needed the directory"),
    "no weights": (without_weights, r"model path '.*' holds no weights; needed model.safetensors"),
    "torn weights": (torn_weights, r"is not a whole safetensors file"),
    "no tokenizer": (without_tokenizer, r"model path: '.*' has no tokenizer"),
    "unsupported architecture": (other_architecture, r"architecture 'Mamba' is not supported; supported: Llama"),
}
TRAIN_FILES: dict[str, tuple[str, str]] = {
    "malformed line": (ROW * 2 + "{oops\n" + ROW, r"dataset.train_path: '.*' line 3: malformed JSON"),
    "wrong key": (ROW + '{"prompt": "a", "reply": "b"}\n', r"line 2: no key 'answer' \(found: prompt, reply\)"),
    "wrong type": ('{"prompt": "a", "answer": 7}\n', r"line 1: 'answer' has type integer"),
    "empty file": ("", r"dataset.train_path: '.*' holds no rows"),
    "no answers left": ('{"prompt": "' + "a " * 99 + '", "answer": " b"}\n', r"no row of 1 has an answer token"),
}
CHANGES: dict[str, tuple[dict, str]] = {
    "batch below dp": ({"dataset__train_bs_n_seqs": 1}, r"dataset.train_bs_n_seqs: 1 sequences cannot be divided"),
    "batch below dp * n_mbs": (
        {"dataset__train_bs_n_seqs": 15, "allocation__n_mbs": 8},
        r"dataset.train_bs_n_seqs: 15 sequences cannot be divided .* use at least 16",
    ),
    "batch above the data": ({"dataset__train_bs_n_seqs": 521}, r"a batch of 521 is more than the dataset's 520 ex"),
    "heads": (TENSOR_8, r"dim \d \('q_heads'\) of size 4 does not divide .* of size 8; use a model_parallel_size"),
    "devices": ({"n_gpus_per_node": 8}, r"data\*pipeline\*model = 2\*1\*2 = 4 devices, but .* = 8; set n_gpus"),
    "missing data": ({"dataset__train_path": "none.jsonl"}, r"dataset.train_path: 'none.jsonl' does not exist"),
    "unknown option": ({"dataset__train_bs": 8}, r"unknown option dataset.train_bs\b.*dataset.train_bs_n_seqs"),
    "a logger that is not installed": ({"wandb_mode": "offline"}, r"wandb_mode: 'offline' needs the package wandb"),
}


def assert_refused(trial: Trial, message: str, capsys: pytest.CaptureFixture[str], **changes) -> None:
    """Fails unless the command ends within seconds, with code 2 and one line that holds `message`."""
    start = time.process_time()
    assert trial.run(**changes) == 2
    assert time.process_time() - start < SECONDS
    error = capsys.readouterr().err
    assert re.fullmatch(rf"realjax: error: .*{message}.*\n", error), error
    cache = trial.root / ".cache"  # of tokens
    assert not [path for path in trial.root.rglob("*") if path.is_file() and not path.is_relative_to(cache)]


@pytest.mark.parametrize("case", MODELS)
def test_models(case, trial, tmp_path, capsys):
    make, message = MODELS[case]
    assert_refused(trial, message, capsys, model__path=make(tmp_path))


@pytest.mark.parametrize("option", ["train_path", "valid_path"])
@pytest.mark.parametrize("case", TRAIN_FILES)
def test_data_files(case, option, trial, tmp_path, capsys):
    text, message = TRAIN_FILES[case]
    path = write(tmp_path / "rows.jsonl", text)
    assert_refused(trial, message.replace("train_path", option), capsys, **{f"dataset__{option}": path})


@pytest.mark.parametrize("case", CHANGES)
def test_options(case, trial, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    changes, message = CHANGES[case]
    assert_refused(trial, message, capsys, **changes)


def test_a_vocabulary_that_tensor_parallelism_does_not_divide(trial, tmp_path, capsys):
    model = llama(tmp_path, vocab_size=321)
    assert_refused(trial, r"\('vocab'\) of size 321 does not divide .* of size 2", capsys, model__path=model)


def test_an_unwritable_output(trial, tmp_path, capsys):
    file = write(tmp_path / "file", "")
    assert_refused(trial, rf"fileroot: cannot write to {file}.*; set fileroot=", capsys, fileroot=file)


def test_a_token_budget_below_a_row(trial, capsys):
    # Known with the first batch only, so the run has begun; but it has taken no step.
    assert trial.run(allocation__max_tokens_per_mb=8) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"realjax: error: .*max_tokens_per_mb=8 is less than one row of .*; set it to.*\n", error)
    assert trial.steps() == []
    assert not list(trial.folder("checkpoints").iterdir()) and not list(trial.folder("recover").iterdir())


def test_a_refused_run_leaves_an_earlier_one_of_its_names_alone(trial, capsys):
    with stopped_after(1):
        assert trial.run() == 143
    before = {path: path.read_bytes() for path in trial.root.rglob("*") if path.is_file()}
    assert trial.run(**TENSOR_8) == 2
    assert {path: path.read_bytes() for path in trial.root.rglob("*") if path.is_file()} == before


@pytest.mark.e2e
def test_the_process_ends_with_code_2_and_one_line(trial, tmp_path):
    log, start = tmp_path / "log", resource.getrusage(resource.RUSAGE_CHILDREN)
    process = start_process(["-m", "realjax.apps.quickstart", "sft", *trial.words(model__path=tmp_path)], log)
    assert process.wait(HANG_SECONDS) == 2
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert used.ru_utime + used.ru_stime - start.ru_utime - start.ru_stime < SECONDS
    assert log.read_text().splitlines()[-1].startswith("realjax: error: model path ")
    assert "Traceback" not in log.read_text()
