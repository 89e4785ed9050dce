"""The guide's commands from first to last, with a tiny model for the hub's: each finds what the one before left."""

import glob
import io
import json
import re

import pytest

from realjax.apps import quickstart
from tests.given.checkpoints import write_llama
from tests.given.commands import kept_log_settings
from tests.given.pages import FENCE, read_page
from tests.given.processes import ROOT

GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
SET = re.compile(r"^(\w+)=\$\(echo (.*)\)$", re.M)
# A message between marks, and the assistant's turn opened, as most templates have it.
TEMPLATE = (
    "{% for m in messages %}<eos>{{ m['role'] }}\n{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<eos>assistant\n{% endif %}"
)
ELSEWHERE = ("pip", "vllm", "curl")  # a network, and a program that is not ours


def write_chat_model(directory) -> None:
    """Writes a model that reads conversations of a few hundred tokens."""
    path = write_llama(directory, max_position_embeddings=2048) / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))


def expand(word: str, variables: dict[str, str]) -> list[str]:
    """Returns what a shell makes of a word: variables, then paths that are there."""
    for name, pattern in variables.items():
        if f"${name}" in word:
            found = glob.glob(pattern)
            assert len(found) == 1, f"{name} is {found}"
            word = word.replace(f"${name}", found[0])
    return sorted(glob.glob(word)) or [word] if "*" in word else [word]


@pytest.mark.slow
def test_the_guide_from_first_to_last(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_chat_model(tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct")
    variables = dict(SET.findall(GUIDE))
    quick = {"max_steps": 2, "eval_freq_steps": 2, "num_prompts": 2}
    names = []
    for command in read_page("guide.md", GUIDE):
        words = [one for word in command.words for one in expand(word, variables)]
        names.append(words[1])
        if words[0] in ELSEWHERE:
            continue
        words = [re.sub(rf"^({'|'.join(quick)})=.*", lambda m: f"{m[1]}={quick[m[1]]}", word) for word in words]
        more = ["gen.max_new_tokens=8"] if words[1] in ("chat", "sample") else []
        monkeypatch.setattr("sys.stdin", io.StringIO("Review in one sentence: the score of this western\n"))
        with kept_log_settings():
            assert quickstart.main([*words[1:], *more]) == 0, command
    assert names[:4] == ["install", "data", "sft", "chat"] and {"dpo", "grpo", "sample", "compare", "serve"} <= set(
        names
    )
    assert (tmp_path / "before-after.html").exists()
    pytest.importorskip("torch")
    capsys.readouterr()
    (block,) = (block[3] for block in FENCE.finditer(GUIDE) if block[2] == "python")
    exec(compile(block, "guide.md", "exec"), {})
    answer = capsys.readouterr().out
    (model,) = glob.glob(variables["DPO"])
    monkeypatch.setattr("sys.stdin", io.StringIO("Review in one sentence: the ending of this heist film\n"))
    with kept_log_settings():
        assert quickstart.main(["chat", model, "gen.greedy=True", "gen.max_new_tokens=48"]) == 0
    assert capsys.readouterr().out.strip() == answer.strip()
