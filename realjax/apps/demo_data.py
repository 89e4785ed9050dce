"""What the demo trains on, made on the spot: film reviews from templates, a tokenizer, a tiny model's config.

Reviews that praise are the better ones. A reward model learns that from pairs; `praise_reward` knows it.
"""

import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from realjax.core.json_text import JsonObject
from realjax.hf.families import config_to_hf
from realjax.models.config import ModelConfig
from realjax.rewards.functions import Row

PAD, EOS = "<pad>", "<eos>"
NUM_ANSWERS = 2  # of each sentiment, for one prompt

MODEL = ModelConfig(
    family="llama",
    vocab_size=1024,
    hidden_size=128,
    num_layers=2,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=32,
    ffn_size=384,
    max_positions=512,
)

# Every opening ends where the verb of a singular subject follows, so that any answer continues any prompt.
OPENINGS = (
    "The {aspect} of this {genre}",
    "The {aspect} in {maker}'s latest {genre}",
    "The {kind} {genre} from {maker}",
    "From its first minutes, the {aspect} of {maker}'s {genre}",
    "After so many sequels, this {genre} by {maker}",
    "For a {kind} {genre}, the {aspect}",
)
SUBJECTS = {
    "aspect": (
        "acting", "script", "pacing", "camera work", "score", "dialogue", "editing", "plot", "ending", "humor",
        "lead performance", "final hour", "set design", "narration",
    ),
    "genre": (
        "thriller", "comedy", "drama", "western", "documentary", "romance", "mystery", "musical", "war film",
        "heist film", "ghost story", "road movie",
    ),
    "kind": ("low-budget", "three-hour", "much delayed", "family", "small-town", "costume", "quiet", "holiday"),
    "maker": (
        "Okafor", "Lindqvist", "Marchetti", "Tanaka", "Delacroix", "Novak", "Herrera", "Whitfield", "Banerjee",
        "Petrov", "Castellan", "Moreau", "Haddad", "Sorensen",
    ),
}  # fmt: skip
POSITIVE = (
    " is {degree} {good} and {good}, and {praise}.",
    " turns out {good}, even {good}: {praise}.",
    " keeps its {virtue} to the last shot, so that {praise}.",
    " proves {good} from start to finish, with {treat} and {treat}.",
)
NEGATIVE = (
    " is {degree} {bad} and {bad}, and {blame}.",
    " turns out {bad}, even {bad}: {blame}.",
    " loses its {virtue} by the second scene, so that {blame}.",
    " proves {bad} from start to finish, with {flaw} and {flaw}.",
)
VERDICTS = {
    "degree": ("wonderfully", "remarkably", "completely", "surprisingly", "almost painfully", "unusually"),
    "virtue": ("nerve", "charm", "focus", "energy", "sense of wonder", "wit", "heart"),
    "good": (
        "moving", "funny", "elegant", "gripping", "tender", "inventive", "graceful", "clever", "honest", "thrilling",
        "warm", "sharp", "luminous", "delightful",
    ),
    "bad": (
        "dull", "clumsy", "hollow", "tedious", "lifeless", "predictable", "shallow", "muddled", "grating", "stale",
        "forced", "dreary", "bland", "tiresome",
    ),
    "praise": (
        "it lingers in the mind for days", "every scene earns its place", "the audience leaves with a smile",
        "two hours pass like ten minutes", "nobody will want to miss it", "even the smallest part shines",
        "it deserves every award it can get", "the whole cast rises to meet it", "it rewards a second visit",
        "I laughed, cried and bought another ticket",
    ),
    "blame": (
        "I kept looking at my watch", "not one joke lands", "the audience left before the end",
        "ten minutes pass like two hours", "nobody should pay to see it", "even the good actors look lost",
        "it is forgotten before the lights go on", "the whole cast seems half asleep", "once is more than enough",
        "I wanted my money and my evening back",
    ),
    "treat": (
        "a radiant cast", "a score to hum on the way home", "jokes that land every time", "images of rare beauty",
        "characters you come to love", "a finale that soars", "real suspense", "not a wasted line",
    ),
    "flaw": (
        "a wooden cast", "a score that drowns every word", "jokes that die on screen", "images of rare ugliness",
        "characters nobody could care for", "a finale that fizzles", "no suspense at all", "one cliche after another",
    ),
}  # fmt: skip
PRAISING, BLAMING = ("good", "praise", "treat"), ("bad", "blame", "flaw")  # slots of one sentiment only


@dataclass(frozen=True, kw_only=True)
class Review:
    """A prompt and ways to go on, of either sentiment."""

    prompt: str
    pos_answers: tuple[str, ...]
    neg_answers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class DemoFiles:
    """Where the inputs are: `data` holds {sft,paired,prompt}-{train,valid}.jsonl, `model` config and tokenizer."""

    data: Path
    model: Path


def write_demo_files(out: Path, *, seed: int = 1, num_train: int = 4096, num_valid: int = 128) -> DemoFiles:
    """Writes the data files and the model directory (no weights) beneath `out`; equal arguments give equal bytes."""
    files = DemoFiles(data=out / "data", model=out / "model")
    files.data.mkdir(parents=True, exist_ok=True)
    files.model.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    reviews = list(islice(draw_reviews(rng), num_train + num_valid))
    for split, part in (("train", reviews[:num_train]), ("valid", reviews[num_train:])):
        for kind, rows in rows_by_kind(part, rng).items():
            text = "".join(json.dumps({"id": i, **row}) + "\n" for i, row in enumerate(rows))
            (files.data / f"{kind}-{split}.jsonl").write_text(text, encoding="utf-8")
    write_model(files.model, [r.prompt + a for r in reviews[:num_train] for a in (*r.pos_answers, *r.neg_answers)])
    return files


def draw_reviews(rng: random.Random) -> Iterator[Review]:
    """Yields reviews with prompts of which no two are equal, several thousand before they run out."""
    seen: set[str] = set()
    while True:
        prompt = fill_slots(rng.choice(OPENINGS), SUBJECTS, rng)
        if prompt in seen:
            continue
        seen.add(prompt)
        answers = [
            tuple(fill_slots(template, VERDICTS, rng) for template in rng.sample(templates, NUM_ANSWERS))
            for templates in (POSITIVE, NEGATIVE)
        ]
        yield Review(prompt=prompt, pos_answers=answers[0], neg_answers=answers[1])


def fill_slots(template: str, words: Mapping[str, Sequence[str]], rng: random.Random) -> str:
    """Returns the template with a random word in each {slot}, never the same word twice."""
    slots = re.findall(r"\{(\w+)\}", template)
    drawn = {slot: iter(rng.sample(words[slot], slots.count(slot))) for slot in dict.fromkeys(slots)}
    return re.sub(r"\{(\w+)\}", lambda match: next(drawn[match[1]]), template)


def rows_by_kind(reviews: Sequence[Review], rng: random.Random) -> dict[str, list[JsonObject]]:
    """Returns the rows of each kind of data file; an SFT row takes one answer, of either sentiment by chance."""
    return {
        "sft": [{"prompt": r.prompt, "answer": rng.choice(r.pos_answers + r.neg_answers)} for r in reviews],
        "paired": [
            {"prompt": r.prompt, "pos_answers": list(r.pos_answers), "neg_answers": list(r.neg_answers)}
            for r in reviews
        ],
        "prompt": [{"prompt": r.prompt} for r in reviews],
    }


def praise_reward(prompts: Sequence[str], answers: Sequence[str], rows: Sequence[Row]) -> list[float]:
    """Returns 1 for answers with words of praise and none of blame, else 0: what a `reward.fn` is."""
    has_words = lambda answer, slots: any(word in answer for slot in slots for word in VERDICTS[slot])
    return [float(has_words(answer, PRAISING) and not has_words(answer, BLAMING)) for answer in answers]


def write_model(
    directory: Path,
    texts: Iterable[str],
    *,
    model: ModelConfig = MODEL,
    eos: str = EOS,
    before: Sequence[pre_tokenizers.PreTokenizer] = (),
    more_tokens: Sequence[str] = (),
    **options: object,
) -> None:
    """Writes config.json and a byte-level BPE tokenizer trained on `texts`, with end-of-text and padding of its own.

    `before` cuts texts before bytes do, `more_tokens` are special ones, and `options` are transformers'.
    """
    core = Tokenizer(models.BPE())
    of_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([*before, of_bytes]) if before else of_bytes
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=model.vocab_size,
        special_tokens=[PAD, *more_tokens, eos],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    if more_tokens:
        options["additional_special_tokens"] = list(more_tokens)
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=eos, **options).save_pretrained(directory)
    ids = {"pad_token_id": core.token_to_id(PAD), "eos_token_id": core.token_to_id(eos)}
    text = json.dumps({**config_to_hf(model), **ids}, indent=2)
    (directory / "config.json").write_text(text, encoding="utf-8")
