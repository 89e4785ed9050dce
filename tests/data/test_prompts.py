"""Prompts: their tokens, texts and rows; chat templates; how long ones are cut; what is refused."""

import logging

import numpy as np
import pytest
from tokenizers import normalizers

from realjax.data.files import Source
from realjax.data.loader import Dataset, Loader
from realjax.data.packing import unpack
from realjax.data.prompts import PromptDataset, PromptForm, load_prompts
from tests.given.texts import make_tokenizer, write_jsonl

TEXTS = ["the film was", "a film that is good, a film that was not good and not so long", "naïve 😀", "so"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'judge' %}{{ raise_exception('no judges here') }}{% endif %}"
    "<s>{{ m.role + (m.name or '') }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


def write(folder, prompts, **keys):
    rows = [{"id": f"p{i}", "prompt": prompt, **keys} for i, prompt in enumerate(prompts)]
    return str(write_jsonl(folder / "prompts.jsonl", rows))


def load(folder, prompts=TEXTS, tokenizer=None, max_prompts=None, **form) -> PromptDataset:
    path = write(folder, prompts, answer="x")
    source = Source(path=path, name="dataset.path", max_rows=max_prompts)
    return load_prompts(source, tokenizer or make_tokenizer(), PromptForm(**{"max_len": 256, **form}))


def tokens_of(dataset):
    return [dataset.example(i)["tokens"].tolist() for i in range(len(dataset))]


@pytest.mark.parametrize("special", ["", "bos", "bos eos"])
def test_an_answer_can_follow_every_prompt(tmp_path, special):
    tokenizer = make_tokenizer(special)
    dataset = load(tmp_path, tokenizer=tokenizer)
    assert list(dataset.ids) == ["p0", "p1", "p2", "p3"]
    assert dataset.rows[1] == {"id": "p1", "prompt": TEXTS[1], "answer": "x"}
    for index, text in enumerate(TEXTS):
        example = dataset.example(index)
        assert (example["tokens"].dtype, example["prompt_id"].dtype) == (np.int32, np.int32)
        assert (example["prompt_id"].shape, int(example["prompt_id"])) == ((), index)
        assert tokenizer.decode(example["tokens"], skip_special_tokens=True) == text
        assert (tokenizer.bos_token_id in example["tokens"]) == ("bos" in special)
        assert tokenizer.eos_token_id not in example["tokens"]
    assert dataset.lengths.tolist() == [len(tokens) for tokens in tokens_of(dataset)]
    assert dataset.longest == dataset.lengths.max()


def test_an_eos_that_the_prompt_itself_ends_in_stays(tmp_path):
    tokenizer = make_tokenizer()
    assert tokens_of(load(tmp_path, ["so</s>"], tokenizer))[0] == tokenizer("so</s>")["input_ids"]


def test_a_batch_says_which_prompt_is_where(tmp_path):
    dataset: Dataset = load(tmp_path)
    loader = Loader(dataset, batch_size=3, num_epochs=3, seed=1)
    seen = []
    for step in range(loader.total_steps):
        for sequence in unpack(loader.batch(step)):
            index = int(sequence["prompt_id"])
            assert sequence["tokens"].tolist() == dataset.example(index)["tokens"].tolist()
            seen.append(index)
    assert sorted(seen) == sorted(3 * list(range(len(dataset))))
    assert dataset.order(0, 0, shuffle=False).tolist() == [0, 1, 2, 3]


def test_long_prompts_lose_their_beginning_and_are_counted(tmp_path, caplog):
    whole = tokens_of(load(tmp_path))
    with caplog.at_level(logging.WARNING):
        cut = load(tmp_path, max_len=4)
    assert tokens_of(cut) == [tokens[-4:] for tokens in whole]
    assert [row["prompt"] for row in cut.rows] == TEXTS
    num_cut = sum(len(tokens) > 4 for tokens in whole)
    assert 0 < num_cut < len(TEXTS)
    assert [record.message for record in caplog.records] == [
        f"dataset.path: {num_cut} of 4 prompts have more tokens than max_prompt_len=4 and lose their beginning"
    ]


def test_padding_stands_in_front(tmp_path):
    tokenizer = make_tokenizer()
    padded = tokens_of(load(tmp_path, tokenizer=tokenizer, max_len=12, pad_to_max_length=True))
    for found, plain in zip(padded, tokens_of(load(tmp_path, max_len=12)), strict=True):
        assert found == [tokenizer.eos_token_id] * (12 - len(plain)) + plain


def test_the_first_prompts_can_be_asked_for(tmp_path):
    assert [row["prompt"] for row in load(tmp_path, max_prompts=2).rows] == TEXTS[:2]
    assert len(load(tmp_path, max_prompts=9)) == 4


@pytest.mark.parametrize("special", ["", "bos eos"])
def test_a_chat_template_frames_texts_and_messages(tmp_path, special):
    tokenizer = make_tokenizer(special, chat_template=TEMPLATE)
    messages = [{"role": "system", "content": "be good"}, {"role": "user", "content": "so"}]
    dataset = load(tmp_path, ["so", messages], tokenizer, use_chat_template=True)
    texts = ("<s>user: so\n<s>assistant:", "<s>system: be good\n<s>user: so\n<s>assistant:")
    assert dataset.rows[1]["prompt"] == messages
    for text, tokens in zip(texts, tokens_of(dataset), strict=True):
        assert tokenizer.decode(tokens) == text
        assert tokens.count(tokenizer.bos_token_id) == text.count("<s>")


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (["so", ""], {}, r"dataset.path: '.*prompts.jsonl' line 2: 'prompt' is empty"),
        (
            [["so"]],
            {"use_chat_template": False},
            r"line 1: 'prompt' has type list; every row needs the keys 'prompt' \(string\)",
        ),
        (["so", 3], {"use_chat_template": True}, r"line 2: 'prompt' has type integer; .* \(string or list\)"),
        ([[]], {"use_chat_template": True}, "line 1: 'prompt' is empty"),
        ([["so"]], {"use_chat_template": True}, "line 1: message 1 of 'prompt' is not an object with the strings"),
        ([[{"role": "user"}]], {"use_chat_template": True}, "line 1: message 1 of 'prompt' is not an object"),
        (
            [[{"role": "user", "content": "half \ud83d"}]],
            {"use_chat_template": True},
            "line 1: 'prompt' holds half of a surrogate pair",
        ),
        (
            [[{"role": "judge", "content": "so"}]],
            {"use_chat_template": True},
            r"the tokenizer's chat template refuses the prompt with id 'p0' \(no judges here\)",
        ),
        (
            [[{"role": "user", "content": "so", "name": 3}]],
            {"use_chat_template": True},
            r"the tokenizer's chat template refuses the prompt with id 'p0' \(can only concatenate str",
        ),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused(tmp_path, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, prompts, make_tokenizer(chat_template=TEMPLATE), **options)


def test_tokenizers_that_lack_something_are_refused(tmp_path):
    with pytest.raises(ValueError, match="dataset.use_chat_template: the tokenizer .* has no chat template"):
        load(tmp_path, use_chat_template=True)
    with pytest.raises(ValueError, match="has no EOS token"):
        load(tmp_path, tokenizer=make_tokenizer(eos_token=None))
    with pytest.raises(ValueError, match="dataset.valid_path: .*nowhere.jsonl' does not exist"):
        load_prompts(
            Source(path=str(tmp_path / "nowhere.jsonl"), name="dataset.valid_path"),
            make_tokenizer(),
            PromptForm(max_len=8),
        )


def test_a_prompt_without_tokens_is_refused(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    with pytest.raises(ValueError, match="the prompt with id 'p1' has no tokens"):
        load(tmp_path, ["so", " "], tokenizer)


def test_the_fingerprint_covers_what_rewards_read(tmp_path):
    """Equal prompts whose rows have another `answer` are other data."""
    path = write(tmp_path, TEXTS, answer="x")
    prompts = [load_prompts(Source(path=path), make_tokenizer(), PromptForm(max_len=256))]
    write(tmp_path, TEXTS, answer="y")
    prompts.append(load_prompts(Source(path=path), make_tokenizer(), PromptForm(max_len=256)))
    assert tokens_of(prompts[0]) == tokens_of(prompts[1])
    assert prompts[0].fingerprint != prompts[1].fingerprint
