"""Which tokens of a conversation are learned, in the templates of four families; ⟦learned parts⟧."""

import json

import numpy as np
import pytest

from realjax.data.datasets import load_prompt_answer
from realjax.data.files import Source
from realjax.data.paired import load_paired
from realjax.data.prompts import PromptForm, load_prompts
from realjax.data.sequences import SequenceForm
from tests.given.templates import FAMILIES, GEMMA, LLAMA, MISTRAL, QWEN
from tests.given.texts import make_tokenizer, write_jsonl

TALK = [
    {"role": "user", "content": "the film"},
    {"role": "assistant", "content": "was good"},
    {"role": "user", "content": "so long"},
    {"role": "assistant", "content": "never"},
]
EXPECTED = {
    "llama": "<s><|start|>user<|head|>\n\nthe film<|eot|><|start|>assistant<|head|>\n\n⟦was good<|eot|>⟧"
    "<|start|>user<|head|>\n\nso long<|eot|><|start|>assistant<|head|>\n\n⟦never<|eot|>⟧",
    "qwen": "<|im_start|>system\nbe warm<|im_end|>\n<|im_start|>user\nthe film<|im_end|>\n<|im_start|>assistant\n"
    "⟦was good<|im_end|>⟧\n<|im_start|>user\nso long<|im_end|>\n<|im_start|>assistant\n⟦never<|im_end|>⟧\n",
    "mistral": "<s>[INST] the film[/INST]⟦ was good</s>⟧[INST] so long[/INST]⟦ never</s>⟧",
    "gemma": "<s><turn>user\nthe film<end>\n<turn>model\n⟦was good<end>⟧\n"
    "<turn>user\nso long<end>\n<turn>model\n⟦never<end>⟧\n",
}


def show(example, tokenizer) -> str:
    """Returns an example's text with its learned parts between ⟦ and ⟧, put together token by token."""
    text, changes = "", np.diff(example["loss_mask"].astype(int), prepend=0)
    parts = np.split(example["tokens"], np.flatnonzero(changes))
    signs = ["", *("⟦" if change > 0 else "⟧" for change in changes[changes != 0])]
    for sign, part in zip(signs, parts, strict=True):
        text += sign + tokenizer.decode(part)
    return text + "⟧" * bool(example["loss_mask"][-1])


def learn(folder, tokenizer, *rows, **form) -> list[str]:
    path = folder / "rows.jsonl"
    write_jsonl(path, rows)
    data = load_prompt_answer(Source(path=str(path)), tokenizer, SequenceForm(**{"max_seqlen": 512, **form}))
    return [show(data.example(i), tokenizer) for i in range(len(data))]


@pytest.mark.parametrize("adds", ["", "bos eos"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_answer_is_learned_with_what_ends_it(tmp_path, name, adds):
    tokenizer, whole = FAMILIES[name].tokenizer(adds=adds), EXPECTED[name]
    assert learn(tmp_path, tokenizer, {"messages": TALK}) == [whole]
    start, *_, last = whole.split("⟦")
    alone = whole.replace("⟦", "", 1).replace("⟧", "", 1)
    assert learn(tmp_path, tokenizer, {"messages": TALK}, turns="last") == [alone]
    assert alone.endswith("⟦" + last) and start in alone
    # What comes after the last answer teaches nothing.
    more = [*TALK, {"role": "user", "content": "and"}]
    assert learn(tmp_path, tokenizer, {"messages": more}) == [whole]


@pytest.mark.parametrize("family", [LLAMA, QWEN], ids=["llama", "qwen"])
@pytest.mark.parametrize("talk", [TALK, TALK[:2], [{"role": "system", "content": "be good"}, *TALK]])
def test_marked_turns_are_those_that_transformers_finds(tmp_path, family, talk):
    tokenizer = family.tokenizer(is_marked=True)
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": talk}])
    example = load_prompt_answer(Source(path=str(path)), tokenizer, SequenceForm(max_seqlen=512)).example(0)
    theirs = tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
    assert example["tokens"].tolist() == theirs["input_ids"]
    assert example["loss_mask"].astype(int).tolist() == theirs["assistant_masks"]
    assert learn(tmp_path, tokenizer, {"messages": talk}) == learn(tmp_path, family.tokenizer(), {"messages": talk})


def test_a_template_that_ends_nothing_gets_eos_at_the_end(tmp_path):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + (
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    shown = learn(tmp_path, make_tokenizer("bos", chat_template=template), {"messages": TALK})
    assert shown == ["user: the film\nassistant:⟦ was good\n⟧user: so long\nassistant: ⟦never</s>⟧"]


def test_a_template_that_rewrites_earlier_turns_is_refused_but_for_the_last(tmp_path):
    template = (
        "{% for m in messages %}<s>{{ m.role }}: {% if loop.last %}why {% endif %}{{ m.content }}</s>{% endfor %}"
    )
    tokenizer = make_tokenizer(chat_template=template)
    with pytest.raises(
        ValueError, match="message 2 of the conversation with id 0 in another way .* dataset.turns=last"
    ):
        learn(tmp_path, tokenizer, {"messages": TALK})


def test_pairs_of_conversations_share_their_prompt(tmp_path):
    better, worse = TALK, [*TALK[:3], {"role": "assistant", "content": "and"}]
    rows = [
        {"chosen": better, "rejected": worse},
        {"prompt": TALK[:3], "chosen": better[3:], "rejected": worse[3:]},
        {"prompt": "the film", "chosen": TALK[:2], "rejected": [TALK[0], worse[3]]},
    ]
    for name, family in FAMILIES.items():
        tokenizer = family.tokenizer()
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        data = load_paired(Source(path=str(path)), tokenizer, SequenceForm(max_seqlen=512), max_pairs_per_prompt=1)
        head, tail = EXPECTED[name].rsplit("⟦", 1)
        prompt, answer = head.replace("⟦", "").replace("⟧", ""), tail.split("⟧")[0]
        for i in range(2):
            texts = [tokenizer.decode(tokens) for tokens in data.take_pair(i)]
            assert texts == [prompt + answer, prompt + answer.replace("never", "and")], name
            assert tokenizer.decode(data.take_pair(i)[0][: data.answer_starts[i][0]]) == prompt
        assert tokenizer.decode(data.take_pair(2)[0]) == EXPECTED[name].split("⟧")[0].replace("⟦", "")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_is_a_conversation_up_to_its_answer(tmp_path, name):
    tokenizer = FAMILIES[name].tokenizer()
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": TALK, "answer": "7"}, {"messages": TALK[:3]}])
    data = load_prompts(Source(path=str(path)), tokenizer, PromptForm(max_len=512))
    expected = EXPECTED[name].rsplit("⟦", 1)[0].replace("⟦", "").replace("⟧", "")
    assert [tokenizer.decode(data.example(i)["tokens"]) for i in range(2)] == [expected] * 2
    assert data.rows[0]["answer"] == "7"


def test_a_refusal_of_the_template_names_the_row(tmp_path):
    row = {"messages": [{"role": "system", "content": "be good"}, *TALK]}
    with pytest.raises(ValueError, match=r"chat template refuses the prompt with id 0 \(no system\)"):
        learn(tmp_path, GEMMA.tokenizer(), row)
    assert learn(tmp_path, MISTRAL.tokenizer(), row)[0].startswith("<s>[INST] be good\n\nthe film[/INST]⟦")


def test_long_conversations_are_cut_as_asked(tmp_path):
    tokenizer, rows = LLAMA.tokenizer(), [{"messages": TALK}, {"messages": TALK[:2]}]
    whole = learn(tmp_path, tokenizer, *rows)
    length = len(tokenizer(json.dumps(whole))["input_ids"])  # more than any
    assert learn(tmp_path, tokenizer, *rows, max_seqlen=length, truncate="error") == whole
    short = len(tokenizer(EXPECTED["llama"].replace("⟦", "").replace("⟧", ""))["input_ids"]) - 1
    assert learn(tmp_path, tokenizer, *rows, max_seqlen=short, truncate="drop") == whole[1:]
    (left, _) = learn(tmp_path, tokenizer, *rows, max_seqlen=short, truncate="left")
    assert left.startswith("<s>") and left.endswith("⟦never<|eot|>⟧") and left != whole[0]
    (right, _) = learn(tmp_path, tokenizer, *rows, max_seqlen=short)
    assert right.endswith("⟦never⟧")
    with pytest.raises(ValueError, match="the row with id 0 has .* tokens, more than dataset.max_seqlen"):
        learn(tmp_path, tokenizer, *rows, max_seqlen=short, truncate="error")
