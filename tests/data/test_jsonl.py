import json
import logging

import pytest

from realjax.data.jsonl import load_rows

REQUIRED = {"prompt": str, "answer": str}
GOOD = '{"id": "a", "prompt": "p", "answer": "q"}'


def write(folder, text, name="data.jsonl"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_jsonl_and_json_give_the_same_rows(tmp_path):
    rows = [{"id": i, "prompt": f"p{i}\u2028é", "answer": "😀\nx", "more": [i]} for i in range(5)]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n  \n"
    assert load_rows(write(tmp_path, lines), REQUIRED) == rows
    assert load_rows(write(tmp_path, json.dumps(rows, indent=1), "data.json"), REQUIRED) == rows


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    text = b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n"
    assert len(load_rows(write(tmp_path, text), REQUIRED)) == 1


def test_one_missing_id_numbers_every_row_with_one_warning(tmp_path, caplog):
    lines = [GOOD, '{"prompt": "p", "answer": "q"}', GOOD]
    with caplog.at_level(logging.WARNING):
        rows = load_rows(write(tmp_path, "\n".join(lines)), REQUIRED)
    assert [row["id"] for row in rows] == [0, 1, 2]
    assert len(caplog.records) == 1 and "no id in line 2" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + '\n\n{"prompt": "p",\n', r"line 3: malformed JSON \(.* at column 16\)"),
        (GOOD + "\n[1]", "line 2: found a JSON list; needed an object"),
        (
            '{"prompt": "p", "text": "t"}',
            r"line 1: no key 'answer' \(found: prompt, text\); every row needs the keys 'prompt' \(string\)",
        ),
        ('{"prompt": "p", "answer": 3}', "line 1: 'answer' has type integer"),
        ('{"prompt": null, "answer": "q"}', "line 1: 'prompt' has type null"),
        (GOOD + "\n\n" + GOOD, "line 3: id 'a' was used by line 1 already"),
        ('{"id": [1], "prompt": "p", "answer": "q"}', "line 1: 'id' has type list"),
        ('{"prompt": "\\ud83d", "answer": "q"}', "line 1: 'prompt' holds half of a surrogate pair"),
        (GOOD.encode() + b'\n{"prompt": "\xff"}', "line 2: not UTF-8 text"),
        ("\n \n", "holds no rows"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=message) as caught:
        load_rows(path, REQUIRED, "dataset.valid_path")
    assert str(caught.value).startswith(f"dataset.valid_path: {path!r}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"prompt": "p", "answer": "q"},\n {"prompt": "p"}]', "item 2: no key 'answer'"),
        ('[{"prompt": "p"}\n {]', "malformed JSON .* at line 2 column 2"),
        (b'[\n\n"\xff"]', r"not UTF-8 text \(byte 0xff on line 3\)"),
        (GOOD, "holds a JSON object; a .json file needs one list"),
        ("[]", "holds no rows"),
    ],
)
def test_a_bad_list_is_named_by_item(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_rows(write(tmp_path, text, "data.json"), REQUIRED)


def test_paths_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    for path, message in [
        ("", "no path given"),
        (str(tmp_path / "none.jsonl"), "does not exist"),
        (str(tmp_path / "folder.jsonl"), "is a directory without data files"),
        (write(tmp_path, GOOD, "data.txt"), "extension '.txt'"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_rows(path, REQUIRED)
