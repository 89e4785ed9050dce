"""A sequence cut anywhere into prompt and answer: the two texts are always that of the whole."""

import numpy as np
import pytest

from realjax.core.texts import cut_at, decode_answers, make_stop_fn
from tests.given.texts import make_tokenizer, make_words_tokenizer

BYTES, WORDS = make_tokenizer("bos"), make_words_tokenizer()


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


STOPS = [("b",), ("ab",), ("c", "abc a"), (" a", "ca b", "é"), ("日本", "a日"), ("本", "c c c"), ("no such text",)]
PIECES = {"a": 0.2, "b": 0.2, "c": 0.2, "d": 0.05, " ": 0.15, "é": 0.05, "日": 0.05, "本": 0.05, "</s>": 0.05}


@pytest.mark.parametrize("stop", STOPS, ids=str)
def test_the_tokens_up_to_a_stop_text_tell_where_the_whole_text_is_cut(stop):
    """Whatever stands where chunks of tokens meet: parts of characters, of stop texts, special tokens."""
    rng, has_stopped, num_cut = np.random.default_rng(0), make_stop_fn(BYTES, stop), 0
    read = lambda prompt, tokens: decode_answers(BYTES, [prompt.tolist()], [tokens.tolist()])[1][0]
    for _ in range(12):
        whole = np.array(BYTES.encode("".join(rng.choice(list(PIECES), 60, p=list(PIECES.values())))), np.int32)
        prompt, answer = whole[:4], whole[4 : len(whole) - rng.integers(3)]
        hits = [n for n in range(1, len(answer) + 1) if has_stopped(prompt, answer[:n], 0)]
        needed = hits[0] if hits else len(answer)
        num_cut += needed < len(answer) - 5
        assert cut_at(read(prompt, answer[:needed]), stop) == cut_at(read(prompt, answer), stop)
        assert not hits or hits == list(range(needed, len(answer) + 1))
        # What was seen before need not be looked at again.
        for seen in range(needed):
            assert seen == needed - 1 or not has_stopped(prompt, answer[: needed - 1], seen)
            assert has_stopped(prompt, answer[:needed], seen) == bool(hits)
            assert has_stopped(prompt, answer, seen) == bool(hits)
    assert num_cut > 2 or stop == ("no such text",)


@pytest.mark.parametrize(
    ("stop", "text"), [(("c", "abc a"), "dabc a"), (("c", "abc日"), "dabc日"), (("c", "abc a"), "dabcb")]
)
def test_a_stop_text_waits_for_an_earlier_one_in_the_making(stop, text):
    tokens = np.array(make_tokenizer().encode(text), np.int32)
    has_stopped = make_stop_fn(make_tokenizer(), stop)
    hits = [has_stopped(tokens[:0], tokens[: n + 1], n) for n in range(len(tokens))]
    assert hits == [False] * (len(tokens) - 1) + [True]
