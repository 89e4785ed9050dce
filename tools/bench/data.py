"""Measures how long data take before the first step, and the memory of it: without a cache, at the first start, later,
and where a run goes on at step 1,000.

    python -m tools.bench.data --rows 300000

Each start is a process of its own that loads the rows, plans all batches and makes the first that it needs; it prints
seconds, and the peak of its resident set above what its imports take. Files that are mapped count where they were
touched; the system may take that memory back. Afterwards each makes batches of steps all over the run, which have to be
the same, bit for bit, in all of them.
"""

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from realjax.data.datasets import load_prompt_answer
from realjax.data.files import Source
from realjax.data.loader import Loader
from realjax.data.sequences import SequenceForm

MIB = 2**20
WORDS = [
    f"{a}{b}{c}" for a in ("ta", "mo", "ri", "se") for b in ("lin", "ver", "do", "ka") for c in ("", "s", "ment", "e")
]
RESUMED_STEP, NUM_COMPARED = 1000, 40
# Whether there is a cache, and the first step.
STARTS = {
    "without a cache": (False, 0),
    "first start": (True, 0),
    "second start": (True, 0),
    f"resume at {RESUMED_STEP:,}": (True, RESUMED_STEP),
}


def write_rows(path: Path, num_rows: int, num_words: int) -> None:
    """Writes rows with a prompt and an answer of twice `num_words` words on average, together."""
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for sizes in rng.integers(1, 2 * num_words, (num_rows, 2)).tolist():
            prompt, answer = (" ".join(rng.choice(WORDS, size)) for size in sizes)
            file.write(json.dumps({"prompt": prompt, "answer": f" {answer}"}) + "\n")


def write_tokenizer(folder: Path) -> None:
    """Writes a byte-level BPE tokenizer of the words."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>").save_pretrained(folder)


def start(folder: Path, batch_size: int, cache: bool, step: int) -> None:
    """Loads the rows as a run does and prints what that took, as JSON."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before, began = peak(), time.perf_counter()
    source = Source(path=str(folder / "rows.jsonl"), cache=folder / "cache" if cache else None)
    dataset = load_prompt_answer(source, tokenizer, SequenceForm(max_seqlen=1024))
    loaded = time.perf_counter() - began
    loader = Loader(dataset, batch_size=batch_size, seed=1)
    loader.batch(min(step, loader.total_steps - 1))
    seconds, mib = {"load": loaded, "all": time.perf_counter() - began}, (peak() - before) / MIB
    print(json.dumps({**seconds, "mib": mib, "batches": digest_batches(loader)}))


def digest_batches(loader: Loader) -> str:
    """Returns what the batches of steps all over the run have in common with equal ones alone."""
    found = hashlib.sha256()
    for step in np.linspace(0, loader.total_steps - 1, NUM_COMPARED, dtype=int).tolist():
        batch = loader.batch(step)
        for key in sorted(batch):
            found.update(f"{key} {batch[key].dtype} {batch[key].shape}".encode() + np.asarray(batch[key]).tobytes())
    return found.hexdigest()


def peak() -> int:
    """Returns the largest resident set of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Measures each kind of start and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--words", type=int, default=40, help="of a prompt or an answer, on average")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--start", choices=STARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start:
        start(args.folder, args.batch_size, *STARTS[args.start])
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokenizer(folder)
        write_rows(folder / "rows.jsonl", args.rows, args.words)
        size = (folder / "rows.jsonl").stat().st_size / MIB
        print(f"{args.rows:,} rows, {size:.0f} MiB\n{'':18}{'load s':>8}{'all s':>8}{'peak MiB':>10}")
        digests = set()
        for kind in STARTS:
            words = ["--start", kind, "--folder", name, "--batch-size", str(args.batch_size)]
            command = [sys.executable, "-m", "tools.bench.data", *words]
            line = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            found = json.loads(line)
            print(f"{kind:18}{found['load']:8.1f}{found['all']:8.1f}{found['mib']:10.0f}", flush=True)
            digests.add(found["batches"])
        if len(digests) > 1:
            raise SystemExit("the batches differ from start to start")
        print(f"the batches of {NUM_COMPARED} steps are the same in all starts, bit for bit")


if __name__ == "__main__":
    main()
