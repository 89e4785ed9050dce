"""Data as people have it: each file becomes what it says, or is refused in words."""

import csv
import json
from dataclasses import replace

import pytest

from realjax.data.datasets import load_prompt_answer
from realjax.data.files import Source, read_rows
from realjax.data.intake import Intake
from realjax.data.jsonl import load_rows
from realjax.data.sequences import SequenceForm
from tests.data.test_chat_masks import TALK, show
from tests.given.templates import MISTRAL, QWEN
from tests.given.texts import make_tokenizer, write_jsonl

SHARE = [{"from": "human", "value": "the film"}, {"from": "gpt", "value": "was good"}]
PARTS = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in TALK[:2]]
FIRST = "<|im_start|>user\nthe film<|im_end|>\n<|im_start|>assistant\n⟦was good<|im_end|>⟧\n"
CHAT = "<|im_start|>system\nbe warm<|im_end|>\n" + FIRST
OWN_SYSTEM = "<|im_start|>system\nso<|im_end|>\n" + FIRST
TEXT = "the film⟦ was good<|im_end|>⟧"
SYSTEM = {"role": "system", "content": "so"}

LEARNED = {
    "prompt and answer": ({"prompt": "the film", "answer": " was good"}, TEXT),
    "prompt and completion": ({"prompt": "the film", "completion": " was good"}, TEXT),
    "prompt and response": ({"prompt": "the film", "response": " was good"}, TEXT),
    "question and answer": ({"question": "the film", "answer": "was good"}, "the film\n⟦was good<|im_end|>⟧"),
    "messages": ({"messages": TALK[:2]}, CHAT),
    "messages with a system prompt": ({"messages": [SYSTEM, *TALK[:2]]}, OWN_SYSTEM),
    "messages in parts": ({"messages": PARTS}, CHAT),
    "messages with tools that nobody calls": ({"messages": TALK[:2], "tools": [{"name": "f"}]}, CHAT),
    "messages for prompt and completion": ({"prompt": TALK[:1], "completion": TALK[1:2]}, CHAT),
    "messages after a text": ({"prompt": "the film", "completion": TALK[1:2]}, CHAT),
    "ShareGPT": ({"conversations": SHARE}, CHAT),
    "ShareGPT with a system prompt": ({"conversations": [{"from": "system", "value": "so"}, *SHARE]}, OWN_SYSTEM),
    "conversations with roles": ({"conversations": TALK[:2]}, CHAT),
    "Alpaca": (
        {"instruction": "the film", "input": "so", "output": "was good"},
        "the film\n\nso\n\n⟦was good<|im_end|>⟧",
    ),
    "Alpaca without an input": (
        {"instruction": "the film", "input": "", "output": "was good"},
        "the film\n\n⟦was good<|im_end|>⟧",
    ),
    "plain text": ({"text": "the film was good", "meta": {"url": 1}}, "the⟦ film was good<|im_end|>⟧"),
}


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows)


def write_parquet(path, rows):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(rows), path)


WRITERS = {
    ".jsonl": write_jsonl,
    ".json": lambda path, rows: path.write_text(json.dumps(rows)),
    ".csv": write_csv,
    ".parquet": write_parquet,
}


@pytest.fixture(scope="module")
def tokenizer():
    return QWEN.tokenizer()


def learn(source, tokenizer, **form):
    data = load_prompt_answer(source, tokenizer, SequenceForm(max_seqlen=256, **form))
    return [show(data.example(i), tokenizer) for i in range(len(data))]


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("name", LEARNED)
def test_a_row_becomes_what_it_means(tmp_path, tokenizer, name, kind):
    row, expected = LEARNED[name]
    path = tmp_path / f"rows{kind}"
    WRITERS[kind](path, [row, row])
    assert learn(Source(path=str(path)), tokenizer) == [expected] * 2


@pytest.mark.parametrize("name", ["prompt and answer", "Alpaca without an input", "question and answer"])
def test_texts_go_into_the_template_where_asked(tmp_path, tokenizer, name):
    path = write_jsonl(tmp_path / "rows.jsonl", [LEARNED[name][0]])
    (shown,) = learn(Source(path=str(path)), tokenizer, use_chat_template=True)
    answer = LEARNED[name][1].split("⟦")[1]
    assert shown == CHAT.split("⟦")[0] + "⟦" + answer


REFUSED = {
    "no known keys": ({"body": "so"}, r"line 1: no known set of keys \(found: id, body\); needed prompt and answer; "),
    "a call of nothing": (
        {"messages": [TALK[0], {"role": "assistant", "content": None, "tool_calls": [{}]}]},
        "line 1: message 2 of 'messages' has tool_calls; it needs to be a list of objects",
    ),
    "a call in some form": (
        {"conversations": [{"from": "function_call", "value": "so"}]},
        "has the role function_call",
    ),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "message 1 of 'messages' holds more than text",
    ),
    "nobody answers": ({"messages": TALK[:1]}, "no message of 'messages' is the assistant's"),
    "no messages": ({"messages": []}, "'messages' holds no messages"),
    "no content": ({"messages": [{"role": "user"}]}, "message 1 of 'messages' is not an object with the strings"),
    "no output": ({"instruction": "so", "output": None}, "'answer' has type null"),
}


CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOL_TALK = [
    TALK[0],
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "two"},
    {"role": "assistant", "content": "was good"},
]
TOOL_TEMPLATE = (
    "{% for t in tools or [] %}{{ t.name }}\n{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("kind", [".jsonl", ".csv"])
def test_calls_of_tools_are_learned_and_their_answers_are_not(tmp_path, kind):
    tokenizer = replace(QWEN, template=TOOL_TEMPLATE).tokenizer()
    share = [{"from": "observation", "value": "two"} if one["role"] == "tool" else one for one in TOOL_TALK]
    rows = [{"messages": TOOL_TALK, "tools": [{"name": "add"}]}, {"messages": share, "tools": [{"name": "add"}]}]
    path = tmp_path / f"rows{kind}"
    WRITERS[kind](path, rows)
    call = '{"name": "add", "arguments": {"a": 1}}'
    expected = (
        f"add\n<|im_start|>user\nthe film<|im_end|>\n<|im_start|>assistant\n⟦{call}<|im_end|>⟧\n"
        "<|im_start|>tool\ntwo<|im_end|>\n<|im_start|>assistant\n⟦was good<|im_end|>⟧\n"
    )
    assert learn(Source(path=str(path)), tokenizer) == [expected] * 2


@pytest.mark.parametrize(("family", "places", "message"), [(QWEN, [0, 1], "is asked"), (MISTRAL, [0, 2, 3], "answers")])
def test_a_template_that_leaves_tools_out_is_refused(tmp_path, family, places, message):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": [TOOL_TALK[i] for i in places]}])
    with pytest.raises(ValueError, match=f"leaves out what a tool {message} in the conversation with id"):
        learn(Source(path=str(path)), family.tokenizer())


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_so_is_refused(tmp_path, tokenizer, name):
    row, message = REFUSED[name]
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    with pytest.raises(ValueError, match=rf"^dataset.train_path: '.*rows.jsonl' line 1: .*{message.split(': ')[-1]}"):
        learn(Source(path=str(path)), tokenizer)


def test_rows_of_another_form_than_the_first_are_refused(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", [LEARNED["messages"][0], LEARNED["Alpaca"][0]])
    with pytest.raises(ValueError, match="line 2: no key 'messages' .*; every row needs the keys of the first"):
        learn(Source(path=str(path)), tokenizer)


def test_conversations_need_a_template(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", [LEARNED["messages"][0]])
    with pytest.raises(ValueError, match="dataset.use_chat_template: the tokenizer .* has no chat template"):
        learn(Source(path=str(path)), make_tokenizer())
    with pytest.raises(ValueError, match="line 1: a conversation needs the tokenizer's chat template"):
        learn(Source(path=str(path)), tokenizer, use_chat_template=False)


PAIRS = {
    "lists": ({"prompt": "p", "pos_answers": ["a"], "neg_answers": ["b"]}, ("p", ["a"], ["b"])),
    "chosen": ({"prompt": "p", "chosen": "a", "rejected": "b"}, ("p", ["a"], ["b"])),
    "a common beginning": (
        {"chosen": "Human: so\n\nAssistant: a film", "rejected": "Human: so\n\nAssistant: a plot"},
        ("Human: so\n\nAssistant: a", [" film"], [" plot"]),
    ),
    "conversations": ({"chosen": TALK[:2], "rejected": [TALK[0], TALK[3]]}, (TALK[:1], [TALK[1:2]], [TALK[3:]])),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_are_read_from_what_people_call_them(tmp_path, tokenizer, name):
    row, expected = PAIRS[name]
    source = Source(path=str(write_jsonl(tmp_path / "rows.jsonl", [row])))
    ((found,),) = Intake(task="pairs", source=source, tokenizer=tokenizer, use_chat_template=None).parts()
    assert (found["prompt"], found["pos_answers"], found["neg_answers"]) == expected


LABELS = {
    "answer": ({"prompt": "p", "answer": "a", "label": True}, ("p", "a", True)),
    "completion": ({"prompt": "p", "completion": "a", "label": 0}, ("p", "a", False)),
    "messages": ({"messages": TALK[:2], "label": "true"}, (TALK[:1], TALK[1:2], True)),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_are_read_from_what_people_call_them(tmp_path, tokenizer, name):
    row, expected = LABELS[name]
    source = Source(path=str(write_jsonl(tmp_path / "rows.jsonl", [row])))
    ((found,),) = Intake(task="labels", source=source, tokenizer=tokenizer, use_chat_template=None).parts()
    assert (found["prompt"], found["answer"], found["label"]) == expected


def test_a_directory_is_all_of_its_files_or_a_split(tmp_path):
    write_jsonl(tmp_path / "train-1.jsonl", [{"text": "a"}])
    write_csv(tmp_path / "train-2.csv", [{"text": "b"}])
    (tmp_path / "test").mkdir()
    write_jsonl(tmp_path / "test" / "0.jsonl", [{"text": "c"}])
    (tmp_path / "README.md").write_text("not data")

    def texts(split=None):
        return [row["text"] for _, row in read_rows(Source(path=str(tmp_path), split=split))]

    assert texts() == ["c", "a", "b"] and texts("train") == ["a", "b"] and texts("test") == ["c"]
    with pytest.raises(ValueError, match="no file begins with the split 'dev'"):
        texts("dev")
    with pytest.raises(ValueError, match="train-2.csv line 2: no key 'prompt'"):
        load_rows(Source(path=str(tmp_path), split="train-2"), {"prompt": str})


BAD_FILES = {
    "short.csv": (b"a,b\n1\n", "line 2: found another number of fields than the 2 of the first line"),
    "quote.csv": (b'a,b\n"1"2,3\n', "malformed CSV"),
    "latin.csv": (b"a,b\n1,\xff\n", "not UTF-8 text"),
    "half.parquet": (b"PAR1 so", "no whole Parquet file"),
    "lines.json": (b'{"a": 1}\n{"a": 2\n', "line 2: malformed JSON"),
    "notes.txt": (b"so", "has extension '.txt'; set it to a .jsonl, .json, .csv or .parquet file, a directory"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named(tmp_path, name):
    content, message = BAD_FILES[name]
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^dataset.train_path: '.*{name}'.*{message}"):
        list(read_rows(Source(path=str(tmp_path / name))))


def test_json_lines_may_be_called_json(tmp_path):
    (tmp_path / "rows.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert [row for _, row in read_rows(Source(path=str(tmp_path / "rows.json")))] == [{"text": "a"}, {"text": "b"}]


def test_a_dataset_of_the_hub_comes_through_its_library(tmp_path):
    library = pytest.importorskip("datasets")
    table = library.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    library.DatasetDict(train=table, test=table.select([1])).save_to_disk(tmp_path / "saved")
    saved = str(tmp_path / "saved")
    assert [row["text"] for _, row in read_rows(Source(path=saved))] == ["a", "b"]
    assert [row["text"] for _, row in read_rows(Source(path=saved, split="test"))] == ["b"]
    with pytest.raises(ValueError, match="the library datasets cannot load its split 'dev'"):
        list(read_rows(Source(path=saved, split="dev")))
