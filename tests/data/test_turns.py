"""The tokens of conversations in turns: sampled ones as they were sampled, the template's around them."""

import itertools
import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from realjax.core.texts import decode_answers
from realjax.data.tokens import encode
from realjax.data.turns import TurnTemplate
from realjax.environments.tools import HERMES, ToolCall, find_format
from tests.given.templates import FAMILIES, QWEN, Family
from tests.given.texts import make_tokenizer

FIRST, MORE, LAST = ([{"role": "user", "content": text}] for text in ("the film", "so long", "and its end"))
# What a model has said, with the token that ended it, ⟦between these⟧; all around is the template's.
EXPECTED = {
    "llama": "<s><|start|>user<|head|>\n\nthe film<|eot|><|start|>assistant<|head|>\n\n⟦was good<|eot|>⟧"
    "<|start|>user<|head|>\n\nso long<|eot|><|start|>assistant<|head|>\n\n⟦never<|eot|>⟧"
    "<|start|>user<|head|>\n\nand its end<|eot|><|start|>assistant<|head|>\n\n",
    "qwen": "<|im_start|>system\nbe warm<|im_end|>\n<|im_start|>user\nthe film<|im_end|>\n<|im_start|>assistant\n"
    "⟦was good<|im_end|>⟧\n<|im_start|>user\nso long<|im_end|>\n<|im_start|>assistant\n⟦never<|im_end|>⟧\n"
    "<|im_start|>user\nand its end<|im_end|>\n<|im_start|>assistant\n",
    "mistral": "<s>[INST] the film[/INST]⟦ was good</s>⟧[INST] so long[/INST]⟦ never</s>⟧[INST] and its end[/INST]",
    "gemma": "<s><turn>user\nthe film<end>\n<turn>model\n⟦was good<end>⟧\n"
    "<turn>user\nso long<end>\n<turn>model\n⟦never<end>⟧\n<turn>user\nand its end<end>\n<turn>model\n",
}


def converse(template: TurnTemplate, rounds: list, answers: list[list[int]]) -> tuple[list[int], list[bool]]:
    """Returns the tokens of a conversation with these sampled answers, and which of them were sampled."""
    tokens = template.open(rounds[0], 0)
    mask = [False] * len(tokens)
    for number, answer in enumerate(answers, start=1):
        more = template.follow(rounds[: number + 1], answer[-1], 0)
        tokens, mask = [*tokens, *answer, *more], [*mask, *[True] * len(answer), *[False] * len(more)]
    return tokens, mask


def hand_made(text: str, tokenizer) -> tuple[list[int], list[bool]]:
    """Returns tokens and mask of a text whose sampled parts are marked, each part by itself."""
    tokens, mask = [], []
    for i, part in enumerate(text.replace("⟧", "⟦").split("⟦")):
        ids = encode([part], tokenizer, is_rendered=True)[0]
        tokens, mask = tokens + ids, mask + [i % 2 == 1] * len(ids)
    return tokens, mask


def sampled(text: str, tokenizer) -> list[list[int]]:
    return [encode([part.partition("⟧")[0]], tokenizer, is_rendered=True)[0] for part in text.split("⟦")[1:]]


@pytest.mark.parametrize("adds", ["", "bos eos"])
@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_and_masks_are_those_made_by_hand(name, adds):
    tokenizer, text = FAMILIES[name].tokenizer(adds=adds), EXPECTED[name]
    found = converse(TurnTemplate(tokenizer=tokenizer), [FIRST, MORE, LAST], sampled(text, tokenizer))
    assert found == hand_made(text, tokenizer)


@pytest.mark.parametrize("name", FAMILIES)
def test_sampled_tokens_stay_as_they_were_drawn(name):
    """Letter by letter, as the tokenizer would never write them, and a character that is not whole."""
    tokenizer = FAMILIES[name].tokenizer()
    end = sampled(EXPECTED[name], tokenizer)[0][-1]
    letters = [token for letter in "good" for token in encode([letter], tokenizer, is_rendered=True)[0]]
    half = encode(["é"], tokenizer, is_rendered=True)[0][:1]
    answers = [[*letters, *half, end], [end]]
    tokens, mask = converse(TurnTemplate(tokenizer=tokenizer), [FIRST, MORE, LAST], answers)
    assert [token for token, is_sampled in zip(tokens, mask, strict=True) if is_sampled] == sum(answers, [])
    assert encode([tokenizer.decode(tokens)], tokenizer, is_rendered=True)[0] != tokens
    _, others = hand_made(EXPECTED[name], tokenizer)
    assert mask.count(False) == others.count(False)


def test_another_end_than_the_template_writes_is_kept_beside_it():
    tokenizer = QWEN.tokenizer()
    answer = encode(["was good</s>"], tokenizer, is_rendered=True)[0]
    tokens, _ = converse(TurnTemplate(tokenizer=tokenizer), [FIRST, MORE], [answer])
    assert "was good</s><|im_end|>\n<|im_start|>user" in tokenizer.decode(tokens)


def merging_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of letters in which the last letter of every stand-in grows together with a line break."""
    letters = [chr(i) for i in range(33, 127)] + ["Ċ", "Ġ"]  # the byte-level names of a line break and of a space
    merges = [("r", "Ċ"), ("1", "Ċ"), (".", "Ċ"), ("d", "Ċ")]
    tokens = [*letters, *("".join(pair) for pair in merges), "<end>"]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", chat_template=template)


def test_a_tokenizer_that_merges_over_borders_changes_nothing():
    plain = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    tokenizer = merging_tokenizer(plain)
    whole = encode(["film\ngood\nlong\n"], tokenizer, is_rendered=True)[0]
    assert "dĊ" in tokenizer.convert_ids_to_tokens(whole)
    answer = [*tokenizer.convert_tokens_to_ids(list("good")), tokenizer.eos_token_id]
    rounds = [[{"role": "user", "content": text}] for text in ("film", "long")]
    tokens, mask = converse(TurnTemplate(tokenizer=tokenizer), rounds, [answer])
    assert tokenizer.convert_ids_to_tokens(tokens) == [*"film", "Ċ", *"good", "<end>", "Ċ", *"long", "Ċ"]
    assert [i for i, is_sampled in enumerate(mask) if is_sampled] == [5, 6, 7, 8, 9]


def test_a_template_that_does_not_add_what_follows_is_refused():
    tokenizer = make_tokenizer(chat_template="{% for m in messages | reverse %}{{ m.content }}\n{% endfor %}")
    with pytest.raises(ValueError, match="does not write what follows an answer of the row with id 7"):
        TurnTemplate(tokenizer=tokenizer).follow([FIRST, MORE], 0, 7)


CALL = "{'name': c.function.name, '%s': c.function.arguments} | tojson"
TOOLS = {
    # The manner of Qwen and Hermes, of Mistral, and of Llama: where the call stands, and who gives its result.
    "tags": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>\n"
        "{{ " + CALL % "arguments" + " }}\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>',
        True,
    ),
    "list": (
        "{% for m in messages %}{% if m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}{{ "
        + CALL % "arguments"
        + " }}{% endfor %}]</s>{% elif m.role == 'user' %}[INST] {{ m.content }}[/INST]{% elif m.role == 'assistant' %}"
        " {{ m.content }}</s>{% else %}{{ raise_exception('roles') }}{% endif %}{% endfor %}",
        '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]',
        False,
    ),
    "bare": (
        "{% for m in messages %}<|start|>{{ 'ipython' if m.role == 'tool' else m.role }}\n"
        "{% for c in m.tool_calls or [] %}{{ "
        + CALL
        % "parameters"
        + " }}{% else %}{{ m.content | tojson if m.role == 'tool' else m.content }}"
        "{% endfor %}<|eot|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}",
        '{"name": "add", "parameters": {"a": 1}}',
        True,
    ),
}


@pytest.mark.parametrize("name", TOOLS)
def test_calls_are_those_of_the_template(name):
    template, text, has_role = TOOLS[name]
    family = Family(template=template, eos="</s>", special=("<|im_start|>", "<|im_end|>", "<|start|>", "<|eot|>"))
    turns = TurnTemplate(tokenizer=family.tokenizer())
    form, call = find_format(turns.render), ToolCall(name="add", arguments={"a": 1})
    assert form.write(call) == text and form.has_role == has_role
    assert form.find_calls("so " * (name != "bare") + text + " and") == [call]
    assert form.find_calls(text + "\n" + text) == [call, call]
    assert form.find_calls(text[: text.index("1}")]) == form.find_calls("seven { it") == []
    result = form.reply("add", 'say "two"\nthen')
    tokens = turns.follow([FIRST, [result]], -1, 0)
    shown = turns.tokenizer.decode(tokens)
    assert ("two" in shown and "<tool_response>" not in shown) == has_role


def test_a_template_without_calls_has_those_of_hermes():
    turns = TurnTemplate(tokenizer=QWEN.tokenizer())
    assert find_format(turns.render) == HERMES
    assert json.loads(HERMES.write(ToolCall(name="x")).split("\n")[1]) == {"name": "x", "arguments": {}}


def test_the_template_is_told_of_the_tools():
    tokenizer = make_tokenizer(chat_template="{{ tools | tojson if tools }}{{ messages[0].content }}")
    tools = [{"type": "function", "function": {"name": "add"}}]
    assert '"name": "add"' in tokenizer.decode(TurnTemplate(tokenizer=tokenizer, tools=tools).open(FIRST, 0))
    assert tokenizer.decode(TurnTemplate(tokenizer=tokenizer).open(FIRST, 0)) == "the film"


@pytest.mark.parametrize("name", FAMILIES)
def test_what_was_said_is_shown_without_the_templates_words(name):
    template = TurnTemplate(tokenizer=FAMILIES[name].tokenizer())
    answers = sampled(EXPECTED[name], template.tokenizer)
    tokens, mask = converse(template, [FIRST, MORE, LAST], answers)
    edges = [i for i in range(1, len(mask)) if mask[i] != mask[i - 1]] + [len(mask)]
    parts = [tokens[first:last] for first, last in itertools.pairwise(edges)]
    _, texts = decode_answers(template.tokenizer, [[]] * len(parts), parts, frames=template.frames())
    assert [text.strip() for text in texts] == ["was good", "so long", "never", "and its end"]
