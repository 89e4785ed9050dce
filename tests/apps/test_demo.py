"""The demo's files are what realjax reads, and its stages run one on the other to one report."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from realjax.apps.demo import STAGES, stage_command, stage_config, stage_overrides
from realjax.apps.demo_data import (
    BLAMING,
    MODEL,
    NEGATIVE,
    POSITIVE,
    PRAISING,
    VERDICTS,
    DemoFiles,
    praise_reward,
    write_demo_files,
)
from realjax.data.datasets import load_prompt_answer
from realjax.data.files import Source
from realjax.data.jsonl import load_rows
from realjax.data.sequences import SequenceForm
from realjax.hf.load import load_config
from realjax.options.checks import validate
from tests.given.processes import HANG_SECONDS

NUM_TRAIN, NUM_VALID = 96, 32
TESTS_OWN = {"JAX_NUM_CPU_DEVICES", "JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS"}
# torch is hidden, as on a machine where only the package's own dependencies are installed.
RUN_SMALL = """
import sys
sys.modules["torch"] = None
from pathlib import Path
from realjax.apps.demo import run_demo
sys.exit(run_demo(Path(sys.argv[1]), num_train=2048, num_valid=64))
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> DemoFiles:
    return write_demo_files(tmp_path_factory.mktemp("demo"), num_train=NUM_TRAIN, num_valid=NUM_VALID)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_equal_seeds_give_equal_files_and_others_do_not(files, tmp_path):
    again, other = (
        write_demo_files(tmp_path / name, seed=seed, num_train=NUM_TRAIN, num_valid=NUM_VALID)
        for name, seed in (("again", 1), ("other", 2))
    )
    assert contents(again.data.parent) == contents(files.data.parent)
    assert contents(other.data)["sft-train.jsonl"] != contents(files.data)["sft-train.jsonl"]


def test_the_full_set_has_no_prompt_twice(tmp_path):
    full = write_demo_files(tmp_path)
    prompts = [
        row["prompt"] for split in ("train", "valid") for row in load_rows(str(full.data / f"prompt-{split}.jsonl"), {})
    ]
    assert len(prompts) == len(set(prompts)) == 4096 + 128


def test_the_kinds_of_rows_belong_together(files):
    for split, num_rows in (("train", NUM_TRAIN), ("valid", NUM_VALID)):
        sft = load_rows(str(files.data / f"sft-{split}.jsonl"), {"prompt": str, "answer": str})
        paired = load_rows(
            str(files.data / f"paired-{split}.jsonl"), {"prompt": str, "pos_answers": list, "neg_answers": list}
        )
        prompts = load_rows(str(files.data / f"prompt-{split}.jsonl"), {"prompt": str})
        assert len(sft) == len(paired) == len(prompts) == num_rows
        for one, two, three in zip(sft, paired, prompts, strict=True):
            assert one["prompt"] == two["prompt"] == three["prompt"]
            assert one["answer"] in two["pos_answers"] + two["neg_answers"]


def test_no_word_of_praise_is_also_one_of_blame(files):
    """A reader, or a reward model, can tell the two from the words alone."""
    slots = [set(re.findall(r"\{(\w+)\}", " ".join(templates))) for templates in (POSITIVE, NEGATIVE)]
    good, bad = ({word for slot in own - other for word in VERDICTS[slot]} for own, other in (slots, slots[::-1]))
    assert good and bad and not good & bad
    assert set(PRAISING) < slots[0] and set(BLAMING) < slots[1]


def test_praise_reward_is_one_for_the_better_answers_and_zero_for_the_others(files):
    rows = load_rows(str(files.data / "paired-train.jsonl"), {})
    for key, reward in (("pos_answers", 1), ("neg_answers", 0)):
        answers = [answer for row in rows for answer in row[key]]
        assert praise_reward([""] * len(answers), answers, rows) == [reward] * len(answers)
    assert praise_reward(["", ""], ["", " turns out moving, even dull."], [{}, {}]) == [0, 0]


def test_tokenizer_and_config_fit_together(files):
    tokenizer = AutoTokenizer.from_pretrained(files.model)
    assert load_config(files.model) == MODEL
    assert len(tokenizer) <= MODEL.vocab_size
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    row = load_rows(str(files.data / "sft-valid.jsonl"), {"prompt": str, "answer": str})[0]
    text = row["prompt"] + row["answer"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    source = Source(path=str(files.data / "sft-train.jsonl"))
    data = load_prompt_answer(source, tokenizer, SequenceForm(max_seqlen=MODEL.max_positions))
    assert data.lengths.max() < 64, "the stages cut at 64 tokens"


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.experiment)
def test_a_stage_is_a_valid_command(files, stage, tmp_path):
    checkpoints = {other.experiment: tmp_path / other.experiment for other in STAGES}
    config = stage_config(stage, files, checkpoints, tmp_path)
    validate(config)
    command = stage_command(stage, files, checkpoints, tmp_path).replace("\\\n", "").split()
    assert command == ["realjax", stage.experiment, *stage_overrides(stage, files, checkpoints, tmp_path)]


def changes(output: str) -> dict[str, tuple[float, float]]:
    """Returns what the demo printed of each measure: before and after a stage."""
    lines = re.findall(r"^demo: (.+): (\S+) before, (\S+) after \d+ steps$", output, re.MULTILINE)
    return {subject: (float(before), float(after)) for subject, before, after in lines}


@pytest.mark.e2e
@pytest.mark.slow
def test_the_demo_learns_and_ends_with_one_report(tmp_path):
    # The two devices are the demo's own choice, and it compiles as a user's run does.
    inherited = {name: value for name, value in os.environ.items() if name not in TESTS_OWN}
    done = subprocess.run(
        [sys.executable, "-c", RUN_SMALL, str(tmp_path)],
        capture_output=True,
        text=True,
        env=inherited,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    perplexity, accuracy, reward, praise, length, kl = changes(done.stdout).values()
    assert perplexity[1] < perplexity[0] / 20
    assert accuracy[1] > 0.9
    assert reward[1] > reward[0] + 0.4
    assert praise[1] > praise[0] + 0.1, "what the reward model likes is praise"
    assert 0 < kl[1] < 1 and 0.5 < length[1] / length[0] < 2, "and not something else"
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for stage in STAGES:
        assert page.count(f"<h1>demo / {stage.experiment}</h1>") == 1
    for title in ("Samples on held-out prompts", "Dataflow graph", "Timeline of calls", "task_reward", "ppl"):
        assert title in page
