"""A sequence cut anywhere into prompt and answer: the two texts are always that of the whole."""

import pytest

from realjax.core.texts import cut_at, decode_answers
from tests.data.test_datasets import make_tokenizer, words_tokenizer

BYTES, WORDS = make_tokenizer("bos"), words_tokenizer()


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [(BYTES, "so é 日本 long, was it not ?"), (BYTES, " the film"), (BYTES, ""), (WORDS, "the film was good")],
)
def test_prompt_and_answer_are_the_whole_text_wherever_it_is_cut(tokenizer, text):
    tokens = [*tokenizer.encode(text), tokenizer.eos_token_id]
    cuts = range(len(tokens) + 1)
    prompts, answers = decode_answers(tokenizer, [tokens[:i] for i in cuts], [tokens[i:] for i in cuts])
    assert [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)] == [text] * len(cuts)
    assert all("�" not in prompt for prompt in prompts)
    lengths = [len(prompt) for prompt in prompts]
    assert lengths == sorted(lengths) and lengths[0] == 0


def test_an_answer_keeps_the_space_that_its_tokenizer_drops_where_a_text_begins():
    """Llama 2's: the answer decoded by itself is `was good`, and joined with its prompt `the filmwas good`."""
    assert WORDS.decode([2, 3]) == "was good"
    assert decode_answers(WORDS, [[0, 1], []], [[2, 3, 4], [2, 3]]) == (["the film", ""], [" was good", "was good"])


@pytest.mark.parametrize(
    ("stop", "kept"),
    [((), "a\nb\n\nc"), (("\n\n",), "a\nb"), (("c", "b"), "a\n"), (("x",), "a\nb\n\nc"), (("a",), "")],
)
def test_cut_at_the_first_stop(stop, kept):
    assert cut_at("a\nb\n\nc", stop) == kept
