"""Tensors and keys under names of other releases, and models of which a text model is a part."""

import logging
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from realjax.hf.families import config_from_hf
from realjax.hf.load import correct_config, load_config, load_params
from realjax.hf.save import save_hf
from realjax.models.build import build_model
from tests.given.checkpoints import make_checkpoint, read_tensors
from tests.given.compare import assert_bitwise_equal
from tests.given.models import FOUR, GEMMA, SIZES, on_one_device

TEXT = {**SIZES, **GEMMA, **FOUR}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
# What transformers 5 calls in memory what files have under the names of 4.
NEW_NAMES = {
    r"^language_model\.model": "model.language_model",
    r"^language_model\.lm_head": "lm_head",
    r"^(vision_tower|multi_modal_projector)": r"model.\1",
}


def load(path: Path):
    model = build_model(correct_config(load_config(path), path))
    return model, load_params(path, model, on_one_device(model))


def rename(source: Path, target: Path, names: dict[str, str]) -> Path:
    """Writes a checkpoint whose tensors are called as the patterns say."""
    target.mkdir()
    (target / "config.json").write_text((source / "config.json").read_text())
    tensors = {name: x.clone() for name, x in load_file(source / "model.safetensors").items()}
    for pattern, name in names.items():
        tensors = {re.sub(pattern, name, old): x for old, x in tensors.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture(scope="module")
def with_images(tmp_path_factory) -> Path:
    """A tiny Gemma 3 that reads images too."""
    config = transformers.Gemma3Config(
        text_config=TEXT, vision_config={**VISION, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("images")
    transformers.Gemma3ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(path)
    return path


def test_a_model_with_images_is_read_and_written_as_its_text_model(with_images, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="realjax"):
        model, params = load(with_images)
    assert re.search(r"of 88 tensors 34 are no part of the text model", caplog.text)
    assert model.config == config_from_hf({"model_type": "gemma3_text", **TEXT}, "text")
    renamed = rename(with_images, tmp_path / "renamed", NEW_NAMES)
    assert_bitwise_equal(load(renamed)[1], params)
    out = tmp_path / "out"
    save_hf(params, model.config, out, source_dir=with_images)
    theirs = load_file(with_images / "model.safetensors")
    ours = load_file(out / "model.safetensors")
    assert ours.keys() == {
        name.removeprefix("language_model.") for name in theirs if name.startswith("language_model.")
    }
    assert all(torch.equal(x, theirs[f"language_model.{name}"]) for name, x in ours.items())
    whole = transformers.Gemma3ForConditionalGeneration.from_pretrained(with_images).eval()
    alone = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert type(alone) is transformers.Gemma3ForCausalLM
    tokens = torch.arange(1, 30)[None]
    with torch.no_grad():
        assert torch.equal(whole(tokens).logits, alone(tokens).logits)


def test_a_published_config_of_a_model_with_images_says_little():
    """As that of gemma-3-4b-it, whose text part relies on what transformers takes for the rest."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    hf = {"architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [1, 106], "model_type": "gemma3"}
    config = config_from_hf({**hf, "text_config": text, "vision_config": VISION}, "config.json")
    theirs = transformers.Gemma3TextConfig(**text)
    assert [kind.mixer.window for kind in config.layers] == [
        1024 if name == "sliding_attention" else None for name in theirs.layer_types
    ]
    assert len(config.pattern) == 6 and [rope.theta for rope in config.ropes] == [1e4, 1e6]
    assert [rope.factor for rope in config.ropes] == [1.0, 8.0]
    assert (config.vocab_size, config.num_q_heads, config.num_kv_heads, config.head_dim) == (262_208, 8, 4, 256)
    assert config.tied and config.max_positions == 131_072 and config.layers[0].mixer.scale is None
    critic = {**hf, "architectures": ["Gemma3ForSequenceClassification"], "num_labels": 1}
    assert config_from_hf({**critic, "text_config": text}, "config.json") == config.as_critic()
    with pytest.raises(ValueError, match=r"2 pipeline stages of 34 layers .* use a pipeline_parallel_size among \[1\]"):
        config.count_empty_layers(2)


def test_a_published_gpt2_has_no_prefix_and_buffers(tmp_path):
    source = make_checkpoint(tmp_path / "hf", "gpt2")
    bare = rename(source, tmp_path / "bare", {r"^transformer\.": ""})
    tensors = load_file(bare / "model.safetensors")
    for layer in range(len({name.split(".")[1] for name in tensors if name.startswith("h.")})):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(tensors, bare / "model.safetensors", metadata={"format": "pt"})
    (model, params), (_, expected) = load(bare), load(source)
    assert_bitwise_equal(params, expected)
    save_hf(params, model.config, tmp_path / "out", source_dir=bare)
    assert read_tensors(tmp_path / "out") == read_tensors(source)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is true"),
        ({"model_type": "gpt2", "reorder_and_upcast_attn": True}, "reorder_and_upcast_attn is true"),
        ({"model_type": "gpt2", "activation_function": "relu"}, "activation_function 'relu' is not supported"),
        ({"model_type": "gemma", "use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
        ({"model_type": "gemma2", "sliding_window": None}, "sliding_window is null, and layer_types has sliding"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping is not null"),
    ],
)
def test_what_is_not_computed_is_refused(change, message):
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        config_from_hf({**SIZES, **change}, "config.json")


def test_the_first_gemmas_say_gelu_and_mean_its_approximation():
    kinds = {name: config_from_hf({"model_type": "gemma", **SIZES, **name_of}, "x").pattern[0] for name, name_of in {
        "old": {"hidden_act": "gelu"}, "both": {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}
    }.items()}  # fmt: skip
    assert {kind.feed_forward.activation for kind in kinds.values()} == {"gelu_tanh"}


def test_layers_behind_the_last_one_are_left_out_where_a_family_may_have_them(tmp_path, caplog):
    """GLM-4.5 is published with one, which predicts a token further on; transformers passes over it too."""
    for kind in ("glm4_moe", "qwen3"):
        source = make_checkpoint(tmp_path / kind, kind)
        _, params = load(source)
        tensors = load_file(source / "model.safetensors")
        last = {name: x for name, x in tensors.items() if "layers.3." in name}
        behind = {name.replace("layers.3.", "layers.4."): x.clone() for name, x in last.items()}
        behind["model.layers.4.eh_proj.weight"] = torch.zeros(3, 3)
        save_file(tensors | behind, source / "model.safetensors", metadata={"format": "pt"})
        if kind == "qwen3":
            with pytest.raises(ValueError, match=r"model\.layers\.4\."):
                load(source)
            continue
        with caplog.at_level(logging.INFO, logger="realjax"):
            model, again = load(source)
        assert_bitwise_equal(again, params)
        assert f"of {len(tensors | behind)} tensors {len(behind)} are no part of the text model" in caplog.text
        save_hf(again, model.config, tmp_path / "out", source_dir=source)
        assert load_file(tmp_path / "out" / "model.safetensors").keys() == tensors.keys()
