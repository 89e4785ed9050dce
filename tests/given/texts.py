"""Texts: tokenizers, and files of rows with random words."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

WORDS = [
    "the",
    "a",
    "film",
    "was",
    "is",
    "good",
    "bad",
    "long",
    "short",
    "and",
    "but",
    "very",
    "never",
    "its",
    "end",
    "plot",
    "cast",
    "music",
    "dull",
    "warm",
]
VOCAB = 320
TEXTS = ["the film was good and the film was long", "a film that is good, a film that was not", "so so so long"]


def make_tokenizer(special: str = "", **kwargs) -> PreTrainedTokenizerFast:
    """Byte-level BPE with few merges; `special` names what it adds by itself: "bos", "eos" or both."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TEXTS, trainer)
    template = ("<s> " if "bos" in special else "") + "$A" + (" </s>" if "eos" in special else "")
    core.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, core.token_to_id(token)) for token in ("<s>", "</s>")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, **{"bos_token": "<s>", "eos_token": "</s>"} | kwargs)


def make_words_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that drops the space a text begins with, as those of Llama 2 do."""
    core = Tokenizer(models.WordLevel({"▁the": 0, "▁film": 1, "▁was": 2, "▁good": 3, "</s>": 4}, unk_token="</s>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


def write_tokenizer(directory: Path) -> None:
    """Writes a byte-level BPE tokenizer trained on `WORDS`; `<eos>` is token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.save_pretrained(directory)


def write_rows(path: Path, num_rows: int, seed: int) -> Path:
    """Writes rows with a prompt of 2 to 4 words and an answer of 3 to 6."""
    rng = np.random.default_rng(seed)
    rows = [{"prompt": draw_text(rng, 2, 5), "answer": " " + draw_text(rng, 3, 7)} for _ in range(num_rows)]
    return write_jsonl(path, rows)


def write_pairs(path: Path, num_rows: int, seed: int, num_pairs: int = 2) -> Path:
    """Writes rows with a prompt as `write_rows` has them, and as many better and worse answers."""
    rng = np.random.default_rng(seed)
    answers = lambda: [" " + draw_text(rng, 3, 7) for _ in range(num_pairs)]
    rows = [
        {"prompt": draw_text(rng, 2, 5), "pos_answers": answers(), "neg_answers": answers()} for _ in range(num_rows)
    ]
    return write_jsonl(path, rows)


def draw_text(rng: np.random.Generator, low: int, high: int) -> str:
    """Returns a text of at least `low` and fewer than `high` words."""
    return " ".join(rng.choice(WORDS, rng.integers(low, high)))


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Writes a row a line; those without an `id` get their number."""
    path.write_text("".join(json.dumps({"id": i, **row}) + "\n" for i, row in enumerate(rows)))
    return path
