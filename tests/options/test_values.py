"""Text to typed values."""

import itertools
import json
from typing import Literal

import pytest

from realjax.options.values import convert, type_label


@pytest.mark.parametrize("text", ["true", "True", "1", "yes"])
def test_true_spellings(text):
    assert convert(text, bool, "x") is True
    assert convert(text, bool | None, "x") is True


@pytest.mark.parametrize("text", ["false", "False", "0", "no"])
def test_false_spellings(text):
    assert convert(text, bool, "x") is False


@pytest.mark.parametrize("annotation", [int | None, float | None, str | None, bool | None, Literal["a"] | None])
@pytest.mark.parametrize("text", ["null", "None", "none", None])
def test_null_is_none_for_every_optional_type(annotation, text):
    assert convert(text, annotation, "x") is None


@pytest.mark.parametrize("annotation", [int, float, str, bool, list[int], Literal["a"]])
def test_null_is_refused_where_a_value_is_needed(annotation):
    with pytest.raises(ValueError, match="^some.name: found '?null'?; it needs"):
        convert("null", annotation, "some.name")


@pytest.mark.parametrize(
    ("text", "annotation", "value"),
    [
        ("1_000", int, 1000),
        ("-3", int, -3),
        ("1e-5", float, 1e-5),
        ("2", float, 2.0),
        ("b", Literal["a", "b"], "b"),
        ("2", Literal[0, 1, 2], 2),
        ("[1,2]", list[int], [1, 2]),
        ("1, 2", list[int], [1, 2]),
        ("[]", list[int], []),
        ("('x','y')", tuple[str, ...], ("x", "y")),
        (r'["a, b", "\n\n\u00e9"]', tuple[str, ...], ("a, b", "\n\né")),
        ("", str, ""),
        ("/a path=with:all,signs", str, "/a path=with:all,signs"),
    ],
)
def test_text_becomes_the_annotated_type(text, annotation, value):
    converted = convert(text, annotation, "x")
    assert converted == value
    assert type(converted) is type(value)
    # A value of a recipe is typed already and passes unchanged.
    assert convert(value, annotation, "x") == value


TEXTS = ["", ",", " ", "'", '"', "\n", "\\", "\\n", "[", "]", "()", ", and", "it's", '"x"', "null", "é 😀", "a\tb"]


@pytest.mark.parametrize("write", [repr, json.dumps, lambda texts: json.dumps(texts, ensure_ascii=False)])
def test_a_list_in_quotes_of_python_or_json_is_what_was_written(write):
    """Two texts side by side, any of them: a comma or a quote inside one is no border."""
    for pair in itertools.product(TEXTS, TEXTS):
        for value in (list(pair), pair):
            assert convert(write(value), tuple[str, ...], "x") == pair, write(value)
    for text in TEXTS:
        assert convert(write([text]), tuple[str, ...], "x") == (text,)
        # A recipe's texts are as they are.
        assert convert((text,), tuple[str, ...], "x") == (text,)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[', and']", (", and",)),
        (r"['\n']", ("\n",)),
        (r"['\n\n', Question:]", ("\n\n", "Question:")),
        (r"['\\n', '\d']", (r"\n", r"\d")),
        (r"[\n]", (r"\n",)),
        ("', and'", (", and",)),
        ("'a', 'b'", ("a", "b")),
        ("\"['a, b', 'c']\"", ("a, b", "c")),
        (r"[a\, b, c]", ("a, b", "c")),
        (r"\[a\,b\]", ("a", "b")),
        ("[don't, 'tis]", ("don't", "'tis")),
        ("[a,]", ("a",)),
    ],
)
def test_lists_as_shells_and_hydra_leave_them(text, value):
    assert convert(text, tuple[str, ...], "x") == value


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        ("1.5", int),
        (1.0, int),
        (True, int),
        ("1__0", int),
        ("abc", float),
        (True, float),
        ("nan", float),
        ("inf", float),
        ("maybe", bool),
        (2, bool),
        (3, str),
        ("c", Literal["a", "b"]),
        ("1,x", list[int]),
    ],
)
def test_wrong_types_name_option_value_and_type(value, annotation):
    with pytest.raises(ValueError, match=r"^some\.name: found .+; it needs .+"):
        convert(value, annotation, "some.name")


@pytest.mark.parametrize("text", ["'NODE01:0,1,2,3'", r"\'NODE01:0,1,2,3\'", r"NODE01\:0\,1\,2\,3", '"NODE01:0,1,2,3"'])
def test_hydra_quotes_and_escapes_are_taken_off(text):
    assert convert(text, str | None, "x") == "NODE01:0,1,2,3"


def test_type_labels():
    labels = [type_label(annotation) for annotation in (int | None, Literal["a", "b"], list[int], str)]
    assert labels == ["int or null", "a|b", "list of int", "str"]
