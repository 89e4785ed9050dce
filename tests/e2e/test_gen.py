"""The `gen` experiment: answers in the prompts' order, those of transformers, and what is left when it stops."""

import errno
import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from realjax.engine.slots import SlotPrograms
from realjax.record.answers import AnswerWriter
from realjax.runtime import resume
from tests.given.checkpoints import write_llama
from tests.given.commands import Trial
from tests.given.runs import Given
from tests.given.texts import write_jsonl

PROMPTS = ("the film was", "a plot", "its music is", "never", "the cast and the end was very long but", "dull", "warm")
NEW = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, two of whose tokens end a text: the second is one that its greedy answers hold."""
    directory = write_llama(tmp_path_factory.mktemp("gen") / "llama")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 15]}))
    return directory


@pytest.fixture
def trial(given: Given, model: Path, tmp_path: Path) -> Trial:
    rows = [{"id": f"p{i}", "prompt": prompt} for i, prompt in enumerate(PROMPTS)]
    options = {
        "allocation_mode": "manual",
        "n_gpus_per_node": 2,
        "allocation.parallel.data_parallel_size": 2,
        "model.path": model,
        "dataset.path": write_jsonl(tmp_path / "prompts.jsonl", rows),
        "dataset.max_prompt_len": 256,
        "dataset.train_bs_n_seqs": 3,
        "gen.max_new_tokens": NEW,
        "gen.min_new_tokens": 0,
        "gen.num_slots": 4,
    }
    return Trial(given=given, root=tmp_path, experiment="gen", options=options)


def their_answers(model: Path) -> list[str]:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    language_model: Any = AutoModelForCausalLM.from_pretrained(model)
    texts = []
    for prompt in PROMPTS:
        tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
        mask = torch.ones_like(tokens)
        whole = language_model.generate(
            tokens, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=1
        )[0]
        texts.append(tokenizer.decode(whole[tokens.shape[1] :], skip_special_tokens=True))
    return texts


def test_greedy_answers_are_those_of_transformers(trial, model, capsys):
    assert trial.run(gen__greedy=True) == 0
    lines = trial.answers()
    assert [list(line) for line in lines] == [["prompt", "answer", "seq", "id"]] * len(PROMPTS)
    assert [line["id"] for line in lines] == [f"p{i}" for i in range(len(PROMPTS))]
    assert [line["prompt"] for line in lines] == list(PROMPTS)
    assert [line["answer"] for line in lines] == their_answers(model)
    assert all(line["seq"] == line["prompt"] + line["answer"] for line in lines)
    logs = trial.folder("logs")
    assert {path.name for path in logs.iterdir()} >= {
        "config.json",
        "output.jsonl",
        "run.log",
        "report.html",
    }
    shares = [(record["n_seqs"], record["eos_share"]) for record in trial.metrics()]
    assert sum(n * share for n, share in shares) / len(PROMPTS) == pytest.approx(2 / 7)
    output = capsys.readouterr().out
    assert "step 3/3" in output and "tokens/s" in output and str(trial.folder("logs") / "output.jsonl") in output


def test_samples_and_stop_texts(trial):
    assert trial.run(num_samples=2) == 0
    whole = trial.answers()
    expected = [(f"p{i}", sample) for i in range(len(PROMPTS)) for sample in (0, 1)]
    assert [(line["id"], line["sample"]) for line in whole] == expected
    assert any(whole[i]["answer"] != whole[i + 1]["answer"] for i in range(0, len(whole), 2))
    # A text that occurs, and one that does not; how many prompts are handed over at once changes nothing.
    stop = next(line["answer"][5:7] for line in whole if len(line["answer"]) > 10)
    words = json.dumps([stop, "no such text"])
    assert trial.run(num_samples=2, stop=words, dataset__train_bs_n_seqs=7, gen__num_slots=6) == 0
    cut = trial.answers()
    assert [line["answer"] for line in cut] == [line["answer"].split(stop)[0] for line in whole]
    assert all(line["seq"] == line["prompt"] + line["answer"] for line in cut)
    # The first run's files were set aside.
    assert (trial.folder("logs").with_name("trial.1") / "output.jsonl").exists()


def test_a_stop_text_saves_decoding(trial, monkeypatch):
    """Answers of 100 tokens, in one wave: nothing is decoded once all of them have met a stop text."""
    num_rounds, decode = [], SlotPrograms.decode

    def count(self, *args):
        slots, chunk = decode(self, *args)
        num_rounds.append(int(chunk.num_rounds))
        return slots, chunk

    monkeypatch.setattr(SlotPrograms, "decode", count)
    options = {
        "gen__max_new_tokens": 100,
        "gen__min_new_tokens": 100,
        "dataset__train_bs_n_seqs": 7,
        "gen__num_slots": 8,
    }
    assert trial.run(**options) == 0
    whole, num_before = [line["answer"] for line in trial.answers()], sum(num_rounds)
    assert num_before == 99
    num_rounds.clear()
    stop = [answer[10:13] for answer in whole]
    assert trial.run(**options, stop=json.dumps(stop)) == 0
    cut = [min((answer.split(text)[0] for text in stop), key=len) for answer in whole]
    assert [line["answer"] for line in trial.answers()] == cut and max(map(len, cut)) <= 10
    assert sum(num_rounds) == 64  # the first chunk, and the one that ran while it was looked at
    # What goes on after that does so with more tensor parallelism, to the same end.
    assert trial.run(**options, stop=json.dumps(stop[:5]), gen__tail_slots=6) == 0
    cut = [min((answer.split(text)[0] for text in stop[:5]), key=len) for answer in whole]
    assert [line["answer"] for line in trial.answers()] == cut and max(map(len, cut)) > 50
    assert trial.metrics()[0]["moved_mib/generate"] > 0


def test_proposed_tokens_change_no_answer_and_the_log_says_how_many_are_kept(trial):
    options = {"gen__max_new_tokens": 60, "gen__greedy": True}
    assert trial.run(**options) == 0
    whole = trial.answers()
    assert not any("tokens_per_round/generate" in record for record in trial.metrics())
    assert trial.run(**options, gen__prompt_lookup_num_tokens=4, gen__tail_slots=2) == 0
    assert trial.answers() == whole
    assert all(record["tokens_per_round/generate"] > 1 for record in trial.metrics())


def test_a_run_that_broke_keeps_its_answers_and_goes_on_from_them(trial, monkeypatch, capsys):
    assert replace(trial, name="whole").run(num_samples=2) == 0
    append = AnswerWriter.append

    def append_part(self, lines):
        if lines[0]["id"] == "p3":  # the second call
            append(self, lines[:3])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.part))
        append(self, lines)

    with monkeypatch.context() as patch:
        patch.setattr(AnswerWriter, "append", append_part)
        assert trial.run(num_samples=2) == 1
    part = trial.folder("logs") / "output.jsonl.part"
    line = f"realjax: error: {part}: {os.strerror(errno.ENOSPC)}; step 1 is saved in "
    assert capsys.readouterr().err.startswith(line)
    assert not (trial.folder("logs") / "output.jsonl").exists()
    assert len(trial.answers("output.jsonl.part")) == 6 + 3
    assert trial.run(num_samples=2, recover_mode="auto") == 0
    assert "starting after step 1" in capsys.readouterr().out
    whole = (trial.folder("logs").with_name("whole") / "output.jsonl").read_bytes()
    assert (trial.folder("logs") / "output.jsonl").read_bytes() == whole
    assert not (trial.folder("logs") / "output.jsonl.part").exists()
    assert trial.run(num_samples=2, recover_mode="auto") == 0
    assert "all 3 steps were done before" in capsys.readouterr().out
    assert (trial.folder("logs") / "output.jsonl").read_bytes() == whole


def test_a_signal_while_loading_ends_the_run_at_once(trial, monkeypatch, capsys):
    monkeypatch.setattr(resume, "load_role", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert trial.run() == 130
    assert capsys.readouterr().err == "realjax: stopped by SIGINT before there was anything to save\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_a_call(number, trial, monkeypatch, capsys):
    append = AnswerWriter.append

    def append_and_stop(self, lines):
        append(self, lines)
        os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(AnswerWriter, "append", append_and_stop)
        assert trial.run() == 128 + number
    assert len(trial.answers("output.jsonl.part")) == 3
    assert "after step 1; recover_mode=auto continues from here" in capsys.readouterr().out
    assert trial.run(recover_mode="resume") == 0
    assert len(trial.answers()) == len(PROMPTS)


def test_other_options_do_not_go_on_from_the_answers(trial, capsys):
    assert trial.run(gen__max_new_tokens=4) == 0
    assert trial.run(gen__max_new_tokens=5, seed=7, recover_mode="auto") == 2
    assert (
        "was made with another seed (1 there, 7 here), another gen.max_new_tokens (4 there, 5 here)"
        in capsys.readouterr().err
    )
    assert len(trial.answers()) == len(PROMPTS)


def test_other_prompts_and_lost_answers_do_not_go_on(trial, capsys):
    assert trial.run(gen__max_new_tokens=2) == 0
    with (trial.root / "prompts.jsonl").open("a") as file:
        file.write(json.dumps({"id": "p7", "prompt": "one more"}) + "\n")
    assert trial.run(gen__max_new_tokens=2, recover_mode="auto") == 2
    assert "was made with another set of training data" in capsys.readouterr().err
    assert len(trial.answers()) == len(PROMPTS)


def test_nothing_to_write_and_nothing_to_go_on_from(trial, capsys):
    assert trial.run(output_file="null", gen__max_new_tokens=2) == 0
    assert not list(trial.folder("logs").glob("*.jsonl.part")) and not (trial.folder("logs") / "output.jsonl").exists()
    assert replace(trial, name="new").run(recover_mode="resume") == 2
    assert "recover_mode: resume, but " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gen__max_new_tokens": 120}, "model.path: the longest prompt and gen.max_new_tokens make 130 tokens"),
        ({"gen__num_slots": 3}, "gen.num_slots: 3 answers at once cannot be divided over data x pipeline = 2 devices"),
        ({"dataset__use_chat_template": True}, "has no chat template"),
        ({"gen__tail_slots": 4}, "gen.tail_slots: 4 (in a multiple of data=2: 4) is not below the 4 answers that"),
        ({"gen__tail_slots": 1, "gen__tail_model_parallel_size": 4}, "a layer of this model can be shared by [2]"),
        (
            {
                "gen__tail_slots": 2,
                "allocation__parallel__data_parallel_size": 1,
                "allocation__parallel__pipeline_parallel_size": 2,
            },
            "gen.tail_slots: found 2, but allocation has 2 pipeline stages",
        ),
        (
            {
                "gen__prompt_lookup_num_tokens": 2,
                "allocation__parallel__data_parallel_size": 1,
                "allocation__parallel__pipeline_parallel_size": 2,
            },
            "allocation: prompt_lookup_num_tokens=2 needs one pipeline stage, and there are 2;",
        ),
    ],
)
def test_bad_options_are_told_before_the_run_begins(trial, capsys, changes, message):
    assert trial.run(**changes) == 2
    assert message in capsys.readouterr().err
    assert not any(trial.folder("logs").iterdir())


def test_long_prompts_are_cut_and_counted(trial, capsys):
    assert trial.run(dataset__max_prompt_len=2, gen__max_new_tokens=2, gen__greedy=True) == 0
    assert "prompts have more tokens than max_prompt_len=2" in capsys.readouterr().out
    lines = trial.answers()
    assert [line["prompt"] for line in lines] == list(PROMPTS)
    kept = lines[4]["seq"].removesuffix(lines[4]["answer"])
    assert kept and PROMPTS[4].endswith(kept) and kept != PROMPTS[4]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), r"role default \('.*poisoned'\) holds numbers that are not finite as float32, in norm/scale"),
        # Finite, but the logits are not.
        (3e38, r"generate: role default \('.*poisoned'\): its logits are not finite in 3 of 3 answers"),
    ],
)
def test_a_model_that_is_no_model_writes_no_answers(trial, tmp_path, capsys, value, message):
    model = write_llama(tmp_path / "poisoned", poison=value)
    assert trial.run(model__path=model, gen__greedy=True) == 2
    assert re.search(f"realjax: error: {message}", capsys.readouterr().err)
    assert not list(trial.folder("logs").glob("output.jsonl*"))
