"""Adapters in PEFT's form, against PEFT itself: what it reads of ours, what we read of its, and merged weights."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from realjax.core.batch import Batch
from realjax.core.compute import Compute
from realjax.core.lora_config import LoRAConfig
from realjax.core.trees import Tree, flatten_paths, join_trees
from realjax.engine.inference import make_inference
from realjax.hf.adapters import (
    describe_adapters,
    list_kernels,
    load_adapters,
    merge_adapters,
    read_lora,
    save_adapters,
    with_adapters,
)
from realjax.hf.load import load_config, load_params
from realjax.hf.save import save_hf
from realjax.models.build import Model, build_model
from tests.given.checkpoints import write_family
from tests.given.compare import assert_bitwise_equal
from tests.given.models import FAMILY_CONFIGS, KINDS, SIZES, make_layout, on_one_device, quick_jit, random_tree

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

# PEFT asks transformers for a name that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
LORA = LoRAConfig(rank=3, alpha=5)
ATTENTION = replace(LORA, targets=("q", "k", "v", "o"), rank_stabilised=True)
# What a family's tensors allow.
CASES = {
    "llama": LORA,
    "qwen2": replace(LORA, rank_stabilised=True),
    "gpt2": replace(LORA, targets=("o", "up", "down")),
    "qwen3_moe": ATTENTION,
    "gemma2": LORA,
}
TOKENS = np.random.default_rng(0).integers(1, 60, (1, 24)).astype(np.int32)


def write_base(directory: Path, family: str) -> Model:
    """Writes a model, and returns it."""
    keys = {key: value for key, value in KINDS[family][1].items() if key != "sliding_window"}
    write_family(directory, family, **{**SIZES, "vocab_size": 320, **keys})
    return build_model(load_config(directory))


def make_adapted(directory: Path, family: str) -> tuple[Model, Tree, Tree]:
    """Returns a model with adapters, the base that it has written, and random adapters that are not small."""
    plain = write_base(directory, family)
    model = build_model(replace(plain.config, lora=CASES[family]))
    trained = jax.device_put(model.take_trained(random_tree(model, scale=0.1)), jax.devices()[0])
    return model, load_params(directory, plain, on_one_device(plain)), trained


def our_logprobs(model: Model, params: Tree) -> np.ndarray:
    """Returns the log-probabilities of the tokens but the first."""
    batch = Batch.of(
        tokens=TOKENS,
        segment_ids=np.ones_like(TOKENS),
        positions=np.arange(TOKENS.shape[1], dtype=np.int32)[None],
    )
    fn = quick_jit(make_inference(model, "logprobs", make_layout(), Compute(attention="dense")))
    return np.asarray(fn(params, batch)["logprobs"])[0, 1:]


def their_logprobs(module) -> np.ndarray:
    """Returns the same of a torch module."""
    with torch.no_grad():
        tokens = torch.tensor(TOKENS, dtype=torch.long)
        logits = torch.log_softmax(module.eval()(tokens).logits, dim=-1)
        return logits[:, :-1].gather(-1, tokens[:, 1:, None])[0, :, 0].numpy()


@pytest.mark.parametrize("family", CASES)
def test_peft_computes_the_same_with_our_adapters(family, tmp_path):
    model, base, trained = make_adapted(tmp_path / "base", family)
    save_adapters(trained, model.config, tmp_path / "adapter", base=tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    alone = their_logprobs(theirs)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    ours = our_logprobs(model, join_trees(base, trained))
    np.testing.assert_allclose(ours, their_logprobs(theirs), atol=2e-4)
    assert np.abs(ours - alone).max() > 0.01
    merged = merge_adapters(base, trained, CASES[family])
    np.testing.assert_allclose(our_logprobs(build_model(model.config.without_adapters()), merged), ours, atol=2e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_that_peft_made_is_read(family, tmp_path):
    plain = write_base(tmp_path / "base", family)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    modules = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_fc"]}[family]
    own = peft.LoraConfig(r=2, lora_alpha=7, target_modules=modules, fan_in_fan_out=family == "gpt2")
    theirs = peft.get_peft_model(theirs, own)
    with torch.no_grad():
        for name, tensor in theirs.named_parameters():
            if "lora_" in name:
                tensor.normal_(std=0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    config = with_adapters(plain.config, tmp_path / "adapter")
    assert config.lora == LoRAConfig(rank=2, alpha=7, targets={"llama": ("q", "v", "down"), "gpt2": ("up",)}[family])
    model = build_model(config)
    adapters = load_adapters(tmp_path / "adapter", model, on_one_device(model))
    params = join_trees(load_params(tmp_path / "base", plain, on_one_device(plain)), adapters)
    np.testing.assert_allclose(our_logprobs(model, params), their_logprobs(theirs), atol=2e-4)


def test_a_critics_head_goes_with_its_adapters_and_peft_scores_alike(tmp_path):
    plain = write_base(tmp_path / "base", "llama")
    model = build_model(replace(plain.config.as_critic(), lora=LORA))
    trained = jax.device_put(model.take_trained(random_tree(model, scale=0.1)), jax.devices()[0])
    save_adapters(trained, model.config, tmp_path / "adapter", base=tmp_path / "base")
    found = load_adapters(tmp_path / "adapter", model, on_one_device(model))
    assert_bitwise_equal(found, trained)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    theirs.config.pad_token_id = 0
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    base = load_params(tmp_path / "base", plain, on_one_device(plain))
    batch = Batch.of(
        tokens=TOKENS, segment_ids=np.ones_like(TOKENS), positions=np.arange(TOKENS.shape[1], dtype=np.int32)[None]
    )
    fn = quick_jit(make_inference(model, "values", make_layout(), Compute(attention="dense")))
    trunk = {name: tree for name, tree in base.items() if name != "head"}
    value = np.asarray(fn(join_trees(trunk, trained), batch)["values"])[0, -1]
    with torch.no_grad():
        score = theirs(torch.tensor(TOKENS, dtype=torch.long)).logits[0, 0].item()
    assert value == pytest.approx(score, abs=1e-4)


def test_what_is_saved_is_read_back_bitwise_from_and_into_any_layout(tmp_path):
    from realjax.core.axes import optimizer_rules, tree_shardings

    model = build_model(replace(FAMILY_CONFIGS["llama"], lora=LORA))
    whole = random_tree(model)
    wanted = model.take_trained(whole)
    for number, split in enumerate(({"dp": 2, "tp": 2, "zero": 3}, {"pp": 2, "tp": 2})):
        layout = make_layout(**split)
        shardings = tree_shardings(model.axes, model.abstract, optimizer_rules(layout.strategy), layout)
        placed = jax.device_put(wanted, model.take_trained(shardings))
        save_adapters(placed, model.config, tmp_path / str(number), base="base")
        assert_bitwise_equal(load_adapters(tmp_path / str(number), model, shardings), wanted)
    files = [load_file(tmp_path / str(number) / "adapter_model.safetensors") for number in range(2)]
    assert_bitwise_equal(*files)
    assert read_lora(tmp_path / "0", model.config.without_adapters()) == LORA


def test_empty_layers_are_no_part_of_what_is_saved(tmp_path):
    model = build_model(replace(FAMILY_CONFIGS["llama"], lora=LORA))
    filled = build_model(replace(model.config, num_empty_layers=2))
    trained = jax.device_put(model.take_trained(random_tree(model)), jax.devices()[0])
    save_adapters(trained, model.config, tmp_path / "adapter", base="base")
    found = flatten_paths(load_adapters(tmp_path / "adapter", filled, on_one_device(filled)))
    for path, leaf in flatten_paths(trained).items():
        assert_bitwise_equal({path: np.asarray(found[path])[:4]}, {path: leaf})
        assert not np.asarray(found[path])[4:].any()


@pytest.mark.parametrize("family, targets", [("phi3", ("q",)), ("phi3", ("gate",)), ("gpt2", ("v",))])
def test_targets_that_peft_has_no_form_for_are_refused(family, targets):
    config = replace(FAMILY_CONFIGS[family], lora=replace(LORA, targets=targets))
    with pytest.raises(ValueError, match=f"found {targets[0]}, but checkpoints of {family} hold it in one tensor with"):
        list_kernels(config)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"peft_type": "LOHA"}, "peft_type is LOHA; only LORA"),
        ({"use_dora": True}, "use_dora is True, which is not supported"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern is {'q_proj': 4}"),
        ({"r": 4}, "has shape"),
        (None, "nothing in the model takes"),
    ],
)
def test_adapters_that_we_do_not_compute_are_refused(change, message, tmp_path):
    model = build_model(replace(FAMILY_CONFIGS["llama"], lora=LORA))
    trained = jax.device_put(model.take_trained(random_tree(model)), jax.devices()[0])
    save_adapters(trained, model.config, tmp_path, base="base")
    file = tmp_path / "adapter_model.safetensors"
    if change is None:
        save_file({**load_file(file), "base_model.model.model.embed_tokens.lora_embedding_A": np.ones(2)}, file)
    else:
        settings = {**describe_adapters(model.config, "base"), **change}
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        with_adapters(model.config.without_adapters(), tmp_path)


def test_merged_weights_are_a_checkpoint_of_the_dense_model(tmp_path):
    from tools.convert_hf import main

    model, base, trained = make_adapted(tmp_path / "base", "llama")
    save_adapters(trained, model.config, tmp_path / "adapter", base=tmp_path / "base")
    assert main(["merge", "--adapter", str(tmp_path / "adapter"), "--hf", str(tmp_path / "merged")]) == 0
    plain = build_model(model.config.without_adapters())
    save_hf(merge_adapters(base, trained, LORA), plain.config, tmp_path / "ours", source_dir=tmp_path / "base")
    assert_bitwise_equal(*(load_file(tmp_path / name / "model.safetensors") for name in ("merged", "ours")))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").merge_and_unload()
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(their_logprobs(found), their_logprobs(theirs), atol=1e-5)
