"""What people write who come from TRL, transformers or verl, and the line that each of them gets."""

import json
import re

import pytest

from realjax.apps import quickstart
from realjax.options.parsing import parse_overrides
from tests.given.processes import ROOT

# By what is written after a command that would run: what the line says, beginning and remedy.
WORDS = [
    ("sft", "learning_rate=1e-5", "unknown option learning_rate: .*did you mean model.optimizer.lr?"),
    ("sft", "--learning_rate 1e-5", "without dashes: model.optimizer.lr=1e-5"),
    ("sft", "--model_name_or_path=gpt2", "without dashes: model.path=gpt2"),
    ("sft", "model=gpt2", "did you mean model.path=gpt2?"),
    ("sft", "dataset=tatsu-lab/alpaca", "did you mean dataset.train_path=tatsu-lab/alpaca?"),
    (
        "sft",
        "per_device_train_batch_size=8",
        "dataset.train_bs_n_seqs? (it counts the sequences of all devices together)",
    ),
    ("sft", "gradient_accumulation_steps=4", "did you mean allocation.n_mbs? (it cuts the batch of a step"),
    ("sft", "max_length=512", "did you mean dataset.max_seqlen?"),
    ("sft", "bf16=True", "did you mean model.enable_bf16?"),
    ("sft", "lora_r=16", "did you mean model.lora.rank?"),
    ("sft", "load_in_4bit=True", "weights are not quantised"),
    ("sft", "packing=True", "rows are always packed"),
    ("sft", "run.yaml", "--config run.yaml for a file of options"),
    ("dpo", "learning_rate=1e-6", "did you mean actor.optimizer.lr?"),
    ("grpo", "beta=0.04", "did you mean ppo.kl_ctl?"),
    ("grpo", "num_generations=8", "did you mean group_size?"),
    ("grpo", "dataset.train_path=x", "did you mean dataset.path?"),
    ("grpo", "algorithm.adv_estimator=grpo", "the experiment is the algorithm"),
    ("grpo", "actor_rollout_ref.model.path=m", "did you mean actor.path?"),
    ("grpo", "actor_rollout_ref.actor.optim.lr=1e-6", "did you mean actor.optimizer.lr?"),
    ("grpo", "actor_rollout_ref.rollout.gpu_memory_utilization=0.6", "so leave it out"),
    ("stf", "seed=1", "did you mean sft?"),
]
MESSAGES = {"messages": [{"role": "user", "content": "so"}, {"role": "assistant", "content": "good"}]}
# By rows of a file, or its text: what is said of them.
DATA = {
    "a wrong key": ({"body": "so"}, "line 1: no known set of keys (found: body); needed prompt and answer; messages;"),
    "prompts alone": ({"prompt": "so"}, "as they are, gen, ppo, grpo and their like read such rows"),
    "pairs": ({"prompt": "so", "chosen": "a", "rejected": "b"}, "as they are, rw, dpo, simpo and orpo read such rows"),
    "no JSON": ('{"prompt": "so",\n', "line 1: malformed JSON"),
    "no chat template": (MESSAGES, "has no chat template; set it to False for rows of plain prompts and answers"),
}


def read_line(capsys, *words: str) -> str:
    assert quickstart.main(list(words)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def read_table(page: str) -> dict[str, str]:
    """Returns the others' names in a page's table, without values, each with what the table says of it."""
    found: dict[str, str] = {}
    for line in (ROOT / f"docs/{page}.md").read_text().splitlines():
        if len(cells := line.strip("| ").split(" | ")) == 2:
            for name in re.findall(r"`([A-Za-z_]+(?:\.[A-Za-z_]+)*)(?:=[^`]*)?`", cells[0]):
                found[name] = found.get(name, "") + cells[1]
    return found


@pytest.mark.parametrize("page", ["from_trl", "from_verl"])
def test_names_in_the_tables_are_answered_with_what_the_table_says(page):
    """By one of the experiments at least; where the name is an option's too there is nothing to say."""
    table, wrong = read_table(page), []
    for name, here in table.items():
        lines = [line for experiment in ("sft", "dpo", "grpo", "ppo") if (line := refuse(experiment, f"{name}=1"))]
        ours = {option.rpartition(".")[2] for option in re.findall(r"`([\w.]+)", here)}
        said = [set(re.split(r"\W+", line.partition("; ")[2])) for line in lines]
        # What counts for nothing else has a reason.
        if len(lines) == 4 and not any(words & ours or "leave" in words for words in said):
            wrong.append((name, lines[0]))
    assert len(table) > 40 and not wrong


def refuse(experiment: str, word: str) -> str | None:
    """Returns what is said of an option that is not there, None of one that is."""
    try:
        parse_overrides(quickstart.find_experiment(experiment).config_cls, [word])
    except ValueError as error:
        return line if (line := str(error)).startswith("unknown option") else None
    return None


@pytest.mark.parametrize(("experiment", "words", "said"), WORDS, ids=[words for _, words, _ in WORDS])
def test_words_of_others_are_answered_with_ours(capsys, experiment, words, said):
    pattern = ".*".join(re.escape(part) for part in said.split(".*"))
    assert re.search(pattern, read_line(capsys, experiment, *words.split()))


@pytest.mark.parametrize("name", DATA)
def test_data_that_cannot_be_read_is_told_with_its_place(given, tmp_path, capsys, name):
    content, said = DATA[name]
    file = tmp_path / "rows.jsonl"
    file.write_text(content if isinstance(content, str) else f"{json.dumps(content)}\n" * 4)
    words = [f"model.path={given.language_model}", f"dataset.train_path={file}", f"fileroot={tmp_path}"]
    line = read_line(capsys, "sft", *words, "dataset.train_bs_n_seqs=2")
    assert said in line and (str(file) in line or name == "no chat template")


def test_a_path_that_is_not_there_is_told_with_what_may_stand_there(given, tmp_path, capsys):
    model, data = f"model.path={given.language_model}", f"dataset.train_path={given.rows}"
    nowhere = tmp_path / "nowhere"
    assert "give a model directory or a hub identifier" in read_line(capsys, "sft", f"model.path={nowhere}", data)
    line = read_line(capsys, "sft", model, f"dataset.train_path={nowhere}.jsonl")
    assert "does not exist; it needs a .jsonl, .json, .csv or .parquet file" in line
