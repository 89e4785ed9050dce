"""The quickstart's reward modelling and DPO commands, word for word, and what they save."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from realjax.apps import quickstart
from realjax.core.batch import Batch
from realjax.core.compute import Compute
from realjax.data.files import Source
from realjax.data.paired import load_paired
from realjax.data.sequences import SequenceForm
from realjax.engine.inference import make_inference
from realjax.hf.load import load_config, load_params
from realjax.models.build import build_model
from realjax.record.metrics import read_metrics
from realjax.rewards.classifier import load_classifier
from tests.given.checkpoints import write_llama
from tests.given.commands import kept_log_settings
from tests.given.models import make_layout, quick_jit
from tests.given.texts import write_pairs
from tests.options.test_supervised import QUICKSTART_DPO, QUICKSTART_RW

pytestmark = pytest.mark.e2e
PAIRS = 600  # of 300 prompts: a batch of 512 and one of 88


@dataclass(frozen=True, kw_only=True)
class Run:
    """One command's output and the directories beneath its fileroot."""

    root: Path
    output: str

    def folder(self, kind: str) -> Path:
        (trial,) = (self.root / kind).glob("*/*/release")
        return trial

    def saved(self, role: str) -> Path:
        (checkpoint,) = (self.folder("checkpoints") / role).iterdir()
        return checkpoint

    def metrics(self, kind: str) -> list[dict]:
        return [record for record in read_metrics(self.folder("logs") / "metrics.jsonl") if record["kind"] == kind]


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, Path]:
    """A Llama whose padding is its tokenizer's end-of-text token, config.json's another, and pairs."""
    folder = tmp_path_factory.mktemp("inputs")
    model = write_llama(folder / "llama", pad_token_id=0, eos_token_id=5)
    train, valid = (write_pairs(folder / f"{name}.jsonl", n, n, 3) for name, n in (("train", 300), ("valid", 20)))
    paths = dict.fromkeys(("model.path", "actor.path", "ref.path"), model)
    return {**paths, "dataset.train_path": train, "dataset.valid_path": valid}


def carry_out(name: str, words: list[str], given: dict[str, Path], root: Path) -> Run:
    """Runs a quickstart command with the `given` paths; every other word is as it was."""
    words = [f"{key}={given.get(key, value)}" for key, _, value in (word.partition("=") for word in words)]
    log = root / "log"
    with pytest.MonkeyPatch.context() as patch, kept_log_settings(), log.open("w") as file:
        patch.setenv("REALJAX_FILEROOT", str(root))
        patch.setattr("sys.stdout", file)
        assert quickstart.main([name, *words]) == 0
    return Run(root=root, output=log.read_text())


@pytest.fixture(scope="module")
def rw(given, tmp_path_factory) -> Run:
    return carry_out("rw", QUICKSTART_RW, given, tmp_path_factory.mktemp("rw"))


@pytest.fixture(scope="module")
def dpo(given, tmp_path_factory) -> Run:
    return carry_out("dpo", QUICKSTART_DPO, given, tmp_path_factory.mktemp("dpo"))


def test_a_reward_model_is_trained_and_evaluated(rw):
    assert re.search(r"rwTrain +d2p2m2\+sp\+zero2 on 0-7 +default at home", rw.output)
    steps = rw.metrics("train")
    assert [record["n_pairs"] for record in steps] == [512, PAIRS - 512]
    # A fresh head is small: it knows nothing yet.
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=0.1)
    evaluations = rw.metrics("eval")
    assert [record["step"] for record in evaluations] == [0, 2]
    assert all(record["n_pairs"] == 40 and 0 <= record["acc"] <= 1 for record in evaluations)
    assert evaluations[0]["loss"] != evaluations[1]["loss"]


def test_the_saved_reward_model_scores_the_same_in_transformers(rw, given):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    saved = rw.saved("default")
    theirs, report = AutoModelForSequenceClassification.from_pretrained(saved, output_loading_info=True)
    assert not any(report.values())
    assert type(theirs).__name__ == "LlamaForSequenceClassification" and theirs.config.num_labels == 1
    tokenizer = AutoTokenizer.from_pretrained(saved)
    source = Source(path=str(given["dataset.valid_path"]))
    dataset = load_paired(source, tokenizer, SequenceForm(max_seqlen=64), max_pairs_per_prompt=2)
    model = build_model(load_config(saved))
    params = load_params(saved, model, jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), model.abstract))
    values_fn = quick_jit(make_inference(model, "values", make_layout(), Compute()))
    sequences = [tokens for i in range(6) for tokens in dataset.take_pair(i)]
    rows = [json.loads(line) for line in given["dataset.valid_path"].read_text().splitlines()]
    texts = [(r["prompt"], a) for r in rows for pair in zip(r["pos_answers"], r["neg_answers"]) for a in pair][:12]
    as_classifier = load_classifier(saved)(*zip(*texts, strict=True), [{}] * 12)
    for tokens, reward in zip(sequences, as_classifier, strict=True):
        assert tokens[-1] == tokenizer.eos_token_id == 0
        row = np.zeros((1, 64), np.int32)
        segments, positions, ids = row.copy(), row.copy(), row.copy()
        segments[0, : len(tokens)], positions[0, : len(tokens)], ids[0, : len(tokens)] = 1, range(len(tokens)), tokens
        batch = Batch.of(tokens=ids, segment_ids=segments, positions=positions)
        values = np.asarray(values_fn(params, batch)["values"])[0]
        with torch.no_grad():
            score = theirs(torch.from_numpy(tokens).long()[None]).logits.item()
        assert score == pytest.approx(values[len(tokens) - 1], rel=1e-4, abs=1e-6)
        assert reward == pytest.approx(score, rel=1e-4, abs=1e-6)
        # What transformers would read if the end-of-text token were padding too.
        assert abs(score - values[len(tokens) - 2]) > 1e-4
    with pytest.raises(ValueError, match="batch sizes > 1 if no padding token"), torch.no_grad():
        theirs(torch.zeros((2, 4), dtype=torch.long))
    # As docs/pairs.md says: any other token pads.
    longest = max(map(len, sequences))
    padded = np.stack([np.pad(tokens, (0, longest - len(tokens)), constant_values=1) for tokens in sequences])
    theirs.config.pad_token_id = 1
    with torch.no_grad():
        alone = [theirs(torch.from_numpy(tokens).long()[None]).logits.item() for tokens in sequences]
        together = theirs(torch.from_numpy(padded).long(), attention_mask=torch.from_numpy(padded != 1).long()).logits
    np.testing.assert_allclose(together[:, 0], alone, atol=1e-5)


def test_a_saved_reward_model_goes_on_with_its_head(rw, given, tmp_path):
    again = carry_out("rw", QUICKSTART_RW, {**given, "model.path": rw.saved("default")}, tmp_path)
    before, after = rw.metrics("eval")[-1], again.metrics("eval")[0]
    for name in ("loss", "acc", "pos_score", "neg_score"):
        assert after[name] == pytest.approx(before[name], rel=1e-5, abs=1e-6)
    assert json.loads((again.saved("default") / "config.json").read_text())["pad_token_id"] is None


def test_dpo_starts_at_ln_2_and_keeps_its_reference_in_host_memory(dpo):
    assert re.search(r"ref_inf +d4p1m2\+sp on 0-7 +ref from host memory", dpo.output)
    assert re.search(r"actor_train +d2p1m4\+sp\+zero2 on 0-7 +actor at home", dpo.output)
    steps = dpo.metrics("train")
    assert [record["n_pairs"] for record in steps] == [512, 512, 2 * PAIRS - 1024]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(steps[0]["margin"]) < 1e-5 < abs(steps[-1]["margin"])
    assert all(record["moved_mib/ref_inf"] > 0 == record["moved_mib/actor_train"] for record in steps)
    # Once, at the first move: what it took.
    (moved,) = re.findall(r"ref_inf: ref from host memory: moved (\d+\.\d) MiB, .* in \d+\.\d+ s", dpo.output)
    assert float(moved) == pytest.approx(steps[0]["moved_mib/ref_inf"], abs=0.05)
    for name in ("time", "tokens_per_second", "tflops", "memory_mib"):
        assert all(record[f"{name}/{call}"] > 0 for record in steps for call in ("ref_inf", "actor_train"))
    for name in ("graph.png", "timeline.png", "trace.json", "report.html"):
        assert (dpo.folder("logs") / name).stat().st_size > 0


def test_dpo_is_evaluated_with_its_reference(given, tmp_path):
    words = [*QUICKSTART_DPO, f"dataset.valid_path={given['dataset.valid_path']}", "eval_freq_epochs=1"]
    run = carry_out("dpo", words, given, tmp_path)
    first, *_, last = run.metrics("eval")
    assert (first["step"], last["step"]) == (0, 3) and first["n_pairs"] == last["n_pairs"] == 40
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and abs(first["margin"]) < 1e-6
    assert abs(last["margin"]) > 1e-6


def test_the_saved_dpo_actor_is_a_language_model(dpo, given):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    assert [path.name for path in dpo.folder("checkpoints").iterdir()] == ["actor"]
    loaded: Any = AutoModelForCausalLM.from_pretrained(dpo.saved("actor"), output_loading_info=True)
    model, report = loaded
    assert not any(report.values()) and type(model).__name__ == "LlamaForCausalLM"
    assert model.config.pad_token_id == 0
    before = AutoModelForCausalLM.from_pretrained(given["actor.path"])
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_a_reference_free_run_needs_no_reference(given, tmp_path):
    words = [word for word in QUICKSTART_DPO if not word.startswith("ref")]
    run = carry_out("dpo", [*words, "reference_free=True", "benchmark_steps=1"], given, tmp_path)
    (step,) = run.metrics("train")
    assert abs(step["loss"] - math.log(2)) > 1e-4
    assert "role actor" in run.output and "role ref" not in run.output
