"""Records what every experiment computes on tiny models, so that a refactor can show that no number moved.

    python -m tests.parity.record_numbers before.json
    python -m tests.parity.record_numbers after.json --compare before.json

Each experiment runs by its command, in float32 with fixed seeds, in four layouts. A run's record is its metrics by step
(losses, gradient norms, rewards, ...), a digest of every exported tensor, and the answers of `gen`. Where two records
differ, the comparison names run, place and both values, and the exit code is 1. Commands and files are all that is used
here: what lies between may change.
"""

import argparse
import hashlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from safetensors.numpy import load_file  # noqa: E402

from realjax.apps import quickstart  # noqa: E402
from realjax.record.metrics import read_metrics  # noqa: E402
from tests.given.compare import without_clocks  # noqa: E402
from tests.given.runs import GROUPS, Given, list_models, make_rl_options, write_given  # noqa: E402
from tests.given.texts import write_pairs  # noqa: E402

# By name: devices, allocation_mode, and the zero stage of trained roles.
LAYOUTS = {
    "one": (1, "d1p1m1", 0),
    "data-tensor": (4, "d2p1m2", 1),
    "pipeline": (4, "d2p2m1", 0),
    "zero3": (4, "d4p1m1", 3),
}
TRAINED = {"sft": ("model",), "rw": ("model",), "ppo": ("actor", "critic"), "gen": ()}  # the others: the actor
# What a clock, a path or the machine's memory decides.
MEASURED = ("memory_mib", "moved_mib", "device_peak_mib")


def list_options(experiment: str, given: Given, root: Path, pairs: Path) -> dict[str, Any]:
    """Returns the options of an experiment, without its layout."""
    common = {"experiment_name": "numbers", "fileroot": root, "mode": "local"}
    if experiment in GROUPS:
        return make_rl_options(given, root, experiment, eval__num_prompts=4, ref__path=given.ref) | common
    if experiment == "gen":
        gen = {"gen.max_new_tokens": 8, "gen.top_k": 60, "gen.top_p": 0.9, "num_samples": 2}
        return {**common, "model.path": given.actor, "dataset.path": given.prompts, **gen}
    if experiment == "distill":
        models = {"actor.path": given.actor, "teacher.path": given.ref, "actor.optimizer.lr": 0.01}
        return {**common, **models, "dataset.path": given.prompts, "dataset.train_bs_n_seqs": 8} | {
            "distill.gen.max_new_tokens": 8, "distill.top_k": 16, "distill.data_share": 0.5
        }  # fmt: skip
    path = {"sft": given.prompts, "kto": given.labelled}.get(experiment, pairs)
    data = {"dataset.train_path": path, "dataset.max_seqlen": 32}
    models = {f"{role}.path": given.actor for role in list_models(experiment)}
    trained = {f"{role}.optimizer.lr": 0.01 for role in TRAINED.get(experiment, ("actor",))}
    return {**common, **models, **trained, **data, "dataset.train_bs_n_seqs": 8}


def record_run(experiment: str, options: Mapping[str, Any], layout: str, root: Path) -> dict[str, Any]:
    """Runs one command and returns what it left, in numbers and digests."""
    devices, mode, zero_stage = LAYOUTS[layout]
    trial = f"{experiment}-{layout}"
    zero = {f"{role}.zero_stage": zero_stage for role in TRAINED.get(experiment, ("actor",))}
    words = {**options, **zero, "trial_name": trial, "n_gpus_per_node": devices, "allocation_mode": mode}
    control = {} if experiment == "gen" else {"total_train_epochs": 1}
    code = quickstart.main([experiment, *(f"{name}={value}" for name, value in (words | control).items())])
    if code != 0:
        raise RuntimeError(f"{trial}: exit code {code}")
    logs, checkpoints = (next((root / kind).glob(f"*/numbers/{trial}"), None) for kind in ("logs", "checkpoints"))
    record: dict[str, Any] = {}
    if logs and (logs / "metrics.jsonl").exists():
        record["metrics"] = without_clocks(read_metrics(logs / "metrics.jsonl"), *MEASURED)
    if logs and (logs / "output.jsonl").exists():
        record["answers"] = (logs / "output.jsonl").read_text().splitlines()
    exported = sorted(checkpoints.rglob("*.safetensors")) if checkpoints else []
    record["weights"] = dict(line for path in exported for line in digests(path))
    return record


def digests(path: Path) -> Iterator[tuple[str, str]]:
    """Yields role, checkpoint and name of each tensor, and the hash of its bits."""
    for name, tensor in load_file(path).items():
        yield "/".join((*path.parts[-3:-1], name)), hashlib.sha256(tensor.tobytes()).hexdigest()[:16]


def differences(before: Any, after: Any, place: str = "") -> Iterator[str]:
    """Yields a line for every place where two records differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before.keys() | after.keys():
            yield from differences(before.get(key), after.get(key), f"{place}/{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for i, (one, other) in enumerate(zip(before, after)):
            yield from differences(one, other, f"{place}/{i}")
    elif before != after:
        yield f"{place}: {before!r} -> {after!r}"


def main() -> int:
    """Runs all, writes the record, and compares it where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="file to write")
    parser.add_argument("--compare", type=Path, help="record made before")
    parser.add_argument("--only", nargs="*", help="experiments; all when left out")
    args = parser.parse_args()
    records = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        given, pairs = write_given(root / "given"), write_pairs(root / "pairs.jsonl", 32, seed=3)
        for experiment in args.only or quickstart.EXPERIMENTS:
            for layout in LAYOUTS:
                logging.getLogger("realjax").setLevel(logging.WARNING)
                options = list_options(experiment, given, root, pairs)
                records[f"{experiment} {layout}"] = record_run(experiment, options, layout, root)
    text = json.dumps(records, indent=1, sort_keys=True).replace(str(root), "<root>")
    args.record.write_text(text)
    if args.compare is None:
        return 0
    found = sorted(differences(json.loads(args.compare.read_text()), json.loads(text)))
    print("\n".join(found) or f"{len(records)} runs equal to the bit")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
