"""`realjax chat` and `realjax sample`: what checkpoints answer, and how it is told."""

import io
import json
from pathlib import Path

import pytest

from realjax.apps import devices, quickstart
from realjax.apps.chat import talk
from realjax.apps.speaker import Speaker
from realjax.core.generation_config import GenerationConfig
from realjax.core.path_names import shorten_paths
from realjax.options.talk import ChatConfig
from tests.given.commands import kept_log_settings

GREEDY = GenerationConfig(greedy=True, max_new_tokens=24)
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "


def run(*words) -> int:
    with kept_log_settings():
        return quickstart.main([str(word) for word in words])


def make_speaker(path, gen=GREEDY, **options) -> Speaker:
    return Speaker(str(path), ChatConfig(gen=gen, **options), devices.prepare_devices(1, 1, path), num_slots=2)


@pytest.fixture(scope="module")
def speaker(given) -> Speaker:
    return make_speaker(given.actor)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_answers_are_those_of_transformers(given, speaker):
    from transformers import AutoModelForCausalLM

    texts = ["the film was", "it is a fine day", "one more"]
    reference = AutoModelForCausalLM.from_pretrained(given.actor)
    for text, answer in zip(texts, speaker.answer(list(map(user, texts))), strict=True):
        tokens = speaker.tokenizer(text, return_tensors="pt")
        whole = reference.generate(**tokens, do_sample=False, max_new_tokens=24)[0]
        assert answer == speaker.tokenizer.decode(whole[tokens["input_ids"].shape[1] :], skip_special_tokens=True)


def test_an_answer_is_told_as_it_grows(speaker):
    told = []
    (answer,) = speaker.answer([user("the film was")], lambda place, text: told.append((place, text)))
    texts = [text for place, text in told if place == 0]
    assert len(texts) == len(told) > 2 and texts[-1] == answer
    assert all(after.startswith(before) for before, after in zip(texts, texts[1:]))


def test_a_conversation_is_written_in_the_chat_template(given_copy):
    file = given_copy.actor / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": TEMPLATE}))
    plain, chat = (make_speaker(given_copy.actor, system=system) for system in (None, "be kind"))
    written = "system: be kind\nuser: hello\nassistant: "
    assert chat.answer([user("hello")]) != plain.answer([user("hello")])
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": None}))
    assert make_speaker(given_copy.actor).answer([user(written)]) == chat.answer([user("hello")])


def test_the_same_question_has_another_answer(given):
    speaker = make_speaker(given.actor, GenerationConfig(max_new_tokens=24, top_p=1.0))
    once, again = (speaker.answer([user("the film was")]) for _ in range(2))
    assert once != again and make_speaker(given.actor, speaker.config.gen).answer([user("the film was")]) == once


class Echo:
    """Answers with what it was asked, and refuses long conversations."""

    def answer(self, conversations, told_fn):
        text = "|".join(message["content"] for message in conversations[0])
        if len(text) > 12:
            raise ValueError("too long")
        told_fn(0, text[:2])
        told_fn(0, text)
        return [text]


def test_lines_are_messages_and_commands():
    told = []
    talk(Echo(), iter(["one", "/again", "", "/more", "three", "two", "/new", "x", "/quit", "y"]), told.append)
    lines = "".join(told).splitlines()
    assert lines[:2] == ["one", "one"] and lines[2].startswith("/more is no command")
    # What cannot be answered is dropped: the next message is asked without it.
    assert lines[3:] == ["too long", "/new begins a new conversation.", "one|one|two", "x"]


def test_a_pipe_is_answered_line_by_line(given, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("the film was\n/new\nthe film was\n"))
    assert run("chat", given.actor, "gen.greedy=True", "gen.max_new_tokens=8", f"fileroot={tmp_path}") == 0
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first == second and first


def test_models_stand_side_by_side(given, tmp_path, capsys):
    prompts, page = tmp_path / "prompts.jsonl", tmp_path / "page.html"
    rows = [{"prompt": "the <film>"}, {"prompt": [{"role": "user", "content": "a day"}]}, {"prompt": "left out"}]
    prompts.write_text("".join(json.dumps({**row, "id": i}) + "\n" for i, row in enumerate(rows)))
    words = [f"prompts={prompts}", f"output={page}", "num_prompts=2", "gen.greedy=True", "gen.max_new_tokens=8"]
    assert run("sample", given.actor, given.ref, *words, f"fileroot={tmp_path}") == 0
    printed, html = capsys.readouterr().out, page.read_text()
    assert printed.count("[actor]") == printed.count("[ref]") == 2 and "left out" not in printed
    assert "the &lt;film&gt;" in html and "<th>actor</th><th>ref</th>" in html and html.count("<tr>") == 3
    assert "user: a day" in html and str(tmp_path) not in html


def test_names_leave_out_what_all_share():
    shorten = lambda *names: shorten_paths([Path(name) for name in names])
    assert shorten("runs/a/epoch1", "runs/b/epoch1") == ["a/epoch1", "b/epoch1"]
    assert shorten("runs/a", "runs/a") == ["a", "a"] and shorten("org/name") == ["name"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["chat"], "no model is named; write realjax chat MODEL"),
        (["chat", "one", "two"], "chat: found 2 models; talk to one"),
        (["chat", "nowhere", "gen.top_p=2"], "gen.top_p: found 2.0"),
        (["sample", "one"], "prompts: no file is named; set it to a .json or .jsonl file"),
        (["sample", "one", "prompts=x.jsonl", "output=page.txt"], "output: found page.txt"),
        (["sample", "one", "prompts=nowhere.jsonl"], "'nowhere.jsonl' does not exist"),
    ],
)
def test_what_cannot_be_is_refused(words, message, capsys):
    assert run(*words) == 2
    assert message in capsys.readouterr().err


def test_only_language_models_with_what_was_asked_for_answer(given):
    with pytest.raises(ValueError, match="is a reward model or critic"):
        make_speaker(given.reward_model)
    with pytest.raises(ValueError, match="system: the tokenizer of .* has no chat template"):
        make_speaker(given.actor, system="be kind")
    with pytest.raises(ValueError, match=r"prompt \d+ has \d+ tokens"):
        make_speaker(given.actor).answer([user("long " * 5000)])


def test_help_is_for_both(capsys):
    for name in ("chat", "sample"):
        assert run(name, "--help") == 0
        assert f"Usage: realjax {name} MODEL key=value" in capsys.readouterr().out
