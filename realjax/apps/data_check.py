"""Shows data as a model will see them: `realjax data check FILE model=... experiment=sft`."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from realjax.apps.errors import report_errors
from realjax.apps.log import configure_logging
from realjax.apps.words import HELP_FLAGS, say
from realjax.data.datasets import load_prompt_answer
from realjax.data.files import Source
from realjax.data.labelled import load_labelled
from realjax.data.loader import Dataset
from realjax.data.packing import PART_LENS, bucket_len
from realjax.data.paired import load_paired
from realjax.data.prompts import PromptForm, load_prompts
from realjax.data.sequences import SequenceForm
from realjax.experiments.common import load_tokenizer
from realjax.hf.files import resolve_model_path
from realjax.options.data_check import DataCheckConfig
from realjax.options.describe import describe_options
from realjax.options.parsing import parse_overrides

# No row is cut as it is read, so that what would be can be shown.
UNCUT = 2**24
BAR_WIDTH = 40
LEARNED, GIVEN, CUT = "bold green", "dim", "strike red"
SIGNS = {LEARNED: "⟦⟧", CUT: "✂✂"}  # where there are no colours

LoadFn = Callable[[Source, PreTrainedTokenizerBase, DataCheckConfig], Dataset]


def _form(config: DataCheckConfig) -> SequenceForm:
    return SequenceForm(max_seqlen=UNCUT, use_chat_template=config.use_chat_template, turns=config.turns)


LOADERS: Mapping[str, LoadFn] = {
    "sft": lambda source, tokenizer, config: load_prompt_answer(source, tokenizer, _form(config)),
    "rw": lambda source, tokenizer, config: load_paired(source, tokenizer, _form(config), max_pairs_per_prompt=1),
    "kto": lambda source, tokenizer, config: load_labelled(source, tokenizer, _form(config)),
    "ppo": lambda source, tokenizer, config: load_prompts(
        source, tokenizer, PromptForm(max_len=UNCUT, use_chat_template=config.use_chat_template)
    ),
}


def main(words: Sequence[str]) -> int:
    """Runs the command line behind `realjax data check` and returns its exit code."""
    with report_errors("realjax data check") as end:
        if not words or any(word in HELP_FLAGS for word in words):
            say(describe_options(DataCheckConfig, "data check", "FILE model=MODEL"))
            end.code = 0 if words else 2
            return end.code
        paths = [word for word in words if "=" not in word]
        if len(paths) != 1:
            raise ValueError(f"data check: found {len(paths)} files; give one: realjax data check FILE model=MODEL")
        configure_logging()
        check(
            paths[0], parse_overrides(DataCheckConfig, [word for word in words if "=" in word]), Console(soft_wrap=True)
        )
    return end.code


def check(path: str, config: DataCheckConfig, console: Console) -> None:
    """Prints the rows, how long they are, and what a run would cut. ValueError for what it would refuse."""
    if not config.model:
        raise ValueError("model: nothing given; it needs the model whose tokenizer makes the tokens: model=MODEL")
    tokenizer = load_tokenizer(resolve_model_path(config.model, need_weights=False))
    source = Source(path=path, name="data check", split=config.split, max_rows=config.max_samples)
    dataset = LOADERS[config.experiment](source, tokenizer, config)
    for index in range(min(config.rows, len(dataset))):
        show_row(dataset, index, tokenizer, config.max_seqlen, console)
    lengths = sequence_lengths(dataset)
    console.print(histogram(lengths, config.max_seqlen))


def show_row(
    dataset: Dataset, index: int, tokenizer: PreTrainedTokenizerBase, max_seqlen: int, console: Console
) -> None:
    """Prints the sequences of one example."""
    example = dataset.example(index)
    tokens = example["tokens"]
    learned = example.get("loss_mask", np.zeros(len(tokens), np.bool_))
    sizes = example.get(PART_LENS, np.array([len(tokens)]))
    names = {1: ("",), 2: (", better", ", worse")}[len(sizes)] if "desirable" not in example else ("", ", for the KL")
    start = 0
    for name, size in zip(names, sizes.tolist(), strict=True):
        part = slice(start, start + size)
        start += size
        count = f"{size} tokens, {int(learned[part].sum())} learned"
        console.print(f"--- row {dataset.ids[index]}{name}: {count}", markup=False, highlight=False)
        keeps_end = "loss_mask" not in example  # a prompt, whose end stays
        console.print(colour(tokens[part], learned[part], tokenizer, kept_places(size, max_seqlen, keeps_end), console))


def kept_places(size: int, most: int, keeps_end: bool) -> range:
    """Returns the places of the tokens that a run with the default `truncate` keeps."""
    return range(max(0, size - most), size) if keeps_end else range(min(size, most))


def colour(
    tokens: np.ndarray, learned: np.ndarray, tokenizer: PreTrainedTokenizerBase, kept: range, console: Console
) -> Text:
    """Returns the text of a sequence, every second token underlined, coloured by what becomes of each."""
    text, before = Text(), GIVEN
    for place, (token, is_learned) in enumerate(zip(tokens.tolist(), learned.tolist(), strict=True)):
        style = CUT if place not in kept else LEARNED if is_learned else GIVEN
        if console.color_system is None and style != before:
            text.append(SIGNS.get(before, "  ")[1].strip() + SIGNS.get(style, "  ")[0].strip())
        text.append(str(tokenizer.decode([token])), f"{style} underline" if place % 2 else style)
        before = style
    if console.color_system is None:
        text.append(SIGNS.get(before, "  ")[1].strip())
    return text


def sequence_lengths(dataset: Dataset) -> np.ndarray:
    """Returns the tokens of every sequence; an example may hold two."""
    offsets = getattr(dataset, "offsets", None)
    return dataset.lengths if offsets is None else np.diff(offsets)


def histogram(lengths: np.ndarray, most: int) -> Text:
    """Returns how many sequences are how long, by the lengths of rows that batches have; in red what would be cut."""
    ends = np.array(sorted({bucket_len(length) for length in np.unique(lengths).tolist()}))
    counts = np.bincount(np.searchsorted(ends, lengths), minlength=len(ends))
    text = Text(f"{len(lengths)} sequences, {int(lengths.sum())} tokens; by tokens of a sequence:\n")
    for end, count in zip(ends.tolist(), counts.tolist(), strict=True):
        bar = "█" * max(int(count > 0), round(BAR_WIDTH * count / counts.max()))
        text.append(f"{end:>9} {bar} {count}\n", "red" if end > most else "")
    middle = ", ".join(f"{share}% {int(np.percentile(lengths, share))}" for share in (50, 90, 99))
    num_long, num_lost = int((lengths > most).sum()), int(np.maximum(lengths - most, 0).sum())
    text.append(f"up to {middle}, longest {int(lengths.max())}\n")
    text.append(
        f"longer than {most}: {num_long} sequences, which would lose {num_lost} tokens", "red" if num_long else ""
    )
    return text
