"""Every kind of data has each special token once, and one chat template makes the same prompt for all of them."""

import logging

import numpy as np
import pytest

from realjax.data.datasets import load_prompt_answer
from realjax.data.files import Source
from realjax.data.paired import load_paired
from realjax.data.prompts import PromptForm, load_prompts
from realjax.data.sequences import SequenceForm
from realjax.data.tokens import encode, front_tokens
from tests.given.texts import make_tokenizer, make_words_tokenizer, write_jsonl

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MESSAGES = [{"role": "system", "content": "be good"}, {"role": "user", "content": "so long"}]


def sft(path, tokenizer, **options):
    data = load_prompt_answer(Source(path=path), tokenizer, SequenceForm(max_seqlen=256, **options))
    return [(e["tokens"].tolist(), int(np.argmax(e["loss_mask"]))) for e in map(data.example, range(len(data)))]


def pairs(path, tokenizer, **options):
    data = load_paired(Source(path=path), tokenizer, SequenceForm(max_seqlen=256, **options), max_pairs_per_prompt=1)
    return [(data.take_pair(i)[0].tolist(), int(data.answer_starts[i][0])) for i in range(len(data))]


def prompts(path, tokenizer, **options):
    data = load_prompts(Source(path=path), tokenizer, PromptForm(max_len=256, **options))
    return [(data.example(i)["tokens"].tolist(), None) for i in range(len(data))]


def write(folder, *rows):
    """Returns a file that each kind of data can read."""
    full = [{"prompt": prompt, "answer": a, "pos_answers": [a], "neg_answers": ["so"]} for prompt, a in rows]
    return str(write_jsonl(folder / "rows.jsonl", full))


@pytest.mark.parametrize("special", ["", "bos", "eos", "bos eos"])
@pytest.mark.parametrize("load", [sft, pairs, prompts])
def test_a_text_that_has_a_special_token_gets_no_second_one(tmp_path, caplog, load, special):
    tokenizer = make_tokenizer(special)
    plain = load(write(tmp_path, ("the film was", " good")), tokenizer)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        marked = load(write(tmp_path, ("<s>the film was", " good</s>")), tokenizer)
    ((tokens, start),) = marked
    assert tokens.count(tokenizer.bos_token_id) == 1 and tokens[0] == tokenizer.bos_token_id
    assert tokens.count(tokenizer.eos_token_id) == (load is not prompts)
    if "bos" in special:
        assert marked == plain
    else:
        assert (tokens[1:], start) == (plain[0][0], plain[0][1] and plain[0][1] + 1)
    told = [" ".join(record.message.split()[1:]) for record in caplog.records]
    starts = ["1 of 1 texts begin with <s> already, and get no second one"] if "bos" in special else []
    num_answers = {sft: [1], pairs: [2], prompts: []}[load]
    assert told == [*starts, *(f"1 of {n} answers end with </s> already, and get no second one" for n in num_answers)]


@pytest.mark.parametrize("special", ["", "bos eos"])
def test_a_chat_template_makes_one_prompt_for_all(tmp_path, special):
    tokenizer = make_tokenizer(special, chat_template=TEMPLATE)
    path = write(tmp_path, ("so", " good"), (MESSAGES, " good</s>"))
    texts = ["<s><user>so\n<assistant>", "<s><system>be good\n<user>so long\n<assistant>"]
    (first, _), (second, _) = prompts(path, tokenizer, use_chat_template=True)
    assert [tokenizer.decode(tokens) for tokens in (first, second)] == texts
    for load in (sft, pairs):
        for (tokens, start), prompt in zip(load(path, tokenizer, use_chat_template=True), (first, second), strict=True):
            assert tokens[:start] == prompt
            assert tokenizer.decode(tokens[start:]) == " good</s>"


@pytest.mark.parametrize("load", [sft, pairs, prompts])
def test_what_is_wrong_with_a_chat_is_told_by_all(tmp_path, load):
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    with pytest.raises(ValueError, match="dataset.use_chat_template: the tokenizer .* has no chat template"):
        load(write(tmp_path, ("so", "x")), make_tokenizer(), use_chat_template=True)
    with pytest.raises(ValueError, match="line 1: message 1 of 'prompt' is not an object with the strings 'role' and"):
        load(write(tmp_path, ([{"role": "user"}], "x")), tokenizer, use_chat_template=True)
    with pytest.raises(ValueError, match=r"line 1: 'prompt' has type list; every row needs"):
        load(write(tmp_path, (MESSAGES, "x")), tokenizer, use_chat_template=False)


def test_a_long_chat_prompt_keeps_all_that_its_template_writes(tmp_path):
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    long = [{"role": "system", "content": "be good"}, {"role": "user", "content": "a film that is so long " * 20}]
    both = [{"role": role, "content": "so long " * n} for role, n in (("system", 40), ("user", 30))]
    path = write(tmp_path, ("the film was so long " * 20, ""), (long, ""), (both, ""), ("so", ""))
    (*cut, (last, _)) = prompts(path, tokenizer, use_chat_template=True)
    for limit in (40, 60):
        data = load_prompts(Source(path=path), tokenizer, PromptForm(max_len=limit, use_chat_template=True))
        texts = [tokenizer.decode(data.example(i)["tokens"]) for i in range(4)]
        assert all(limit - 3 <= len(data.example(i)["tokens"]) <= limit for i in range(3))
        assert all(text.startswith("<s><") and text.endswith("\n<assistant>") for text in texts)
        assert texts[0].endswith("film was so long \n<assistant>")
        assert texts[1].startswith("<s><system>be good\n<user>") and texts[1].endswith("so long \n<assistant>")
        # The longest loses all of its text before another is touched.
        assert texts[2].startswith("<s><system>\n<user>") and texts[2].endswith("so long \n<assistant>")
        assert data.example(3)["tokens"].tolist() == last
    assert all(len(tokens) > 60 for tokens, _ in cut)
    with pytest.raises(ValueError, match="dataset.max_prompt_len: found 5, but the chat template alone takes more"):
        load_prompts(Source(path=path), tokenizer, PromptForm(max_len=5, use_chat_template=True))


def test_texts_are_encoded_as_the_tokenizer_itself_does_but_for_eos():
    for special in ("", "bos", "eos", "bos eos"):
        tokenizer = make_tokenizer(special)
        expected = [tokenizer(text)["input_ids"] for text in ("", "the film", "naïve 😀")]
        without = [ids[:-1] if "eos" in special else ids for ids in expected]
        assert encode(["", "the film", "naïve 😀"], tokenizer) == without
        assert front_tokens(tokenizer) == [tokenizer.bos_token_id] * ("bos" in special)
    assert front_tokens(make_words_tokenizer()) == []
