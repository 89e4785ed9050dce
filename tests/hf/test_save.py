import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.core.axes import train_rules, tree_shardings
from realjax.core.end_tokens import EndTokens
from realjax.core.layout import Layout, ParallelStrategy
from realjax.core.manifest import MANIFEST, find_damage
from realjax.hf import save
from realjax.hf.families import find_family
from realjax.hf.load import load_config, load_params
from realjax.hf.save import Target, begin_save, save_hf
from realjax.hf.save_config import write_config
from realjax.models.build import build_model, init_params, make_fill
from tests.given.checkpoints import edit_config, make_bin, make_checkpoint, read_tensors
from tests.given.compare import assert_bitwise_equal
from tests.given.models import FIRST_KINDS, KINDS, cut_empty, on_one_device, with_empty_layers
from tests.given.texts import make_tokenizer


def load(source):
    model = build_model(load_config(source))
    return load_params(source, model, on_one_device(model)), model.config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_round_trip_is_bitwise(kind, dtype, tmp_path):
    source = make_checkpoint(tmp_path / "hf", kind, dtype=dtype)
    params, config = load(source)
    save_hf(params, config, tmp_path / "one", source_dir=source)
    save_hf(params, config, tmp_path / "many", source_dir=source, max_shard_bytes=20_000)
    assert read_tensors(tmp_path / "one") == read_tensors(tmp_path / "many") == read_tensors(source)
    theirs, ours = (json.loads((d / "config.json").read_text()) for d in (source, tmp_path / "one"))
    assert ours == theirs


def test_a_round_trip_from_bin_is_bitwise(tmp_path):
    source = make_bin(make_checkpoint(tmp_path / "hf", "llama", dtype="bfloat16"), tmp_path / "bin", num_files=2)
    params, config = load(source)
    save_hf(params, config, tmp_path / "out", source_dir=source)
    assert read_tensors(tmp_path / "out") == read_tensors(source)


@pytest.mark.parametrize("memory_kind", [None, "pinned_host"])
@pytest.mark.parametrize("strategy", [ParallelStrategy(dp=2, tp=4), ParallelStrategy(dp=2, pp=2, tp=2, zero_stage=3)])
def test_every_layout_writes_the_same_tensors(strategy, memory_kind, tmp_path):
    source = make_checkpoint(tmp_path / "hf", "llama-biases")
    model = build_model(load_config(source))
    layout = Layout.of(strategy)
    shardings = tree_shardings(model.axes, model.abstract, train_rules(strategy), layout, memory_kind)
    save_hf(load_params(source, model, shardings), model.config, tmp_path / "out")
    assert read_tensors(tmp_path / "out") == read_tensors(source)


@pytest.mark.parametrize("kind", ["llama-biases", "qwen3"])
def test_empty_layers_are_in_no_checkpoint(kind, tmp_path):
    source = make_checkpoint(tmp_path / "hf", kind, dtype="bfloat16")
    model = with_empty_layers(build_model(load_config(source)), 2)
    layout = Layout.of(ParallelStrategy(dp=2, pp=3, zero_stage=3))
    params = load_params(
        source, model, tree_shardings(model.axes, model.abstract, train_rules(layout.strategy), layout)
    )
    real, of_empty = cut_empty(model, params)
    assert_bitwise_equal(real, load(source)[0])
    assert all(len(leaf) == 2 and not leaf.any() for leaf in of_empty)
    save_hf(params, model.config, tmp_path / "out", source_dir=source)
    assert read_tensors(tmp_path / "out") == read_tensors(source)
    assert (tmp_path / "out" / "config.json").read_text() == (source / "config.json").read_text()


def test_a_layer_gathered_across_processes_is_taken_bit_for_bit():
    bits = np.random.default_rng(0).integers(0, 2**32, (4, 3, 5), dtype=np.uint32)
    x = jnp.asarray(bits.view(np.float32)).at[2, 0, 0].set(-0.0)  # among them not-a-numbers and signed zeros
    for layer in range(4):
        taken = jax.jit(save._take)(x, layer)
        assert np.asarray(taken).tobytes() == np.asarray(x)[layer].tobytes()


def test_shards_keep_to_their_size_and_their_index(tmp_path):
    params, config = load(make_checkpoint(tmp_path / "hf", "llama"))
    save_hf(params, config, tmp_path / "out", max_shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files and len(files) > 2
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert all((tmp_path / "out" / file).stat().st_size < 25_000 for file in files)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_what_is_written_without_a_source(kind, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    source = make_checkpoint(tmp_path / "hf", kind)
    params, config = load(source)
    save_hf(params, config, tmp_path / "out", max_shard_bytes=20_000)
    edit_config(tmp_path / "out", pad_token_id=0)  # published ones may lie beyond a tiny vocabulary
    tokens = torch.arange(40)[None]
    a, b = (AutoModelForCausalLM.from_pretrained(path)(tokens).logits for path in (source, tmp_path / "out"))
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["llama-tied", *FIRST_KINDS])
def test_a_critic_loads_in_transformers_and_here(kind, tmp_path):
    import transformers

    source = make_checkpoint(tmp_path / "hf", kind, dtype="bfloat16")
    model = build_model(load_config(source).as_critic())
    fresh = {"head/kernel": make_fill("head/kernel", (32, 1), seed=3)}
    params = load_params(source, model, on_one_device(model), fresh=fresh)
    save_hf(params, model.config, tmp_path / "out", source_dir=source, dtype="float32")
    if hasattr(transformers, find_family(model.config.family).critic_class):
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
        np.testing.assert_array_equal(theirs.score.weight.detach().numpy(), np.asarray(params["head"]["kernel"]).T)
    again, config = load(tmp_path / "out")
    assert config == model.config
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), params, again)))
    save_hf(params, model.config, tmp_path / "small", source_dir=source)  # the head is no tensor of the source
    assert {dtype for dtype, _, _ in read_tensors(tmp_path / "small").values()} == {"BF16"}


@pytest.mark.parametrize(
    ("pad", "eos", "saved"),
    [(0, 2, 0), (2, 2, None), (None, 2, None), (3, [2, 3], None), (0, [2, 3], 0), (None, None, None)],
)
def test_a_critic_never_pads_with_its_end_of_text(pad, eos, saved, tmp_path):
    """transformers would score the token before it; a language model's padding is nobody's business."""
    source = make_checkpoint(tmp_path / "hf", "llama")
    edit_config(source, pad_token_id=pad, eos_token_id=eos)
    config = load_config(source)
    for name, written, expected in (("critic", config.as_critic(), saved), ("lm", config, pad)):
        (tmp_path / name).mkdir()
        write_config(written, tmp_path / name, source, np.dtype("float32"))
        assert json.loads((tmp_path / name / "config.json").read_text()).get("pad_token_id") == expected


def test_the_source_gives_tokenizer_generation_config_and_unknown_keys(tmp_path):
    source = make_checkpoint(tmp_path / "hf", "llama")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (source / name).write_text(name)
    hf = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**hf, "house": "key"}))
    params, config = load(source)
    save_hf(params, config, tmp_path / "out", source_dir=source, dtype=jnp.bfloat16)
    assert {file.name for file in source.iterdir()} | {MANIFEST} == {f.name for f in (tmp_path / "out").iterdir()}
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "chat_template.jinja"
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {**hf, "house": "key", "dtype": "bfloat16"}
    assert {dtype for dtype, _, _ in read_tensors(tmp_path / "out").values()} == {"BF16"}


def test_an_existing_directory_is_replaced_whole(tmp_path):
    params, config = load(make_checkpoint(tmp_path / "hf", "llama"))
    out = tmp_path / "out"
    out.mkdir()
    (out / "model-00001-of-00002.safetensors").write_text("of an earlier save")
    save_hf(params, config, out)
    assert sorted(file.name for file in out.iterdir()) == ["config.json", MANIFEST, "model.safetensors"]
    assert find_damage(out) is None
    assert sorted(file.name for file in tmp_path.iterdir()) == ["hf", "out"]


def test_a_copy_is_written_when_the_parameters_are_gone(tmp_path):
    params, config = load(make_checkpoint(tmp_path / "hf", "llama"))
    save_hf(params, config, tmp_path / "now")
    write_fn = begin_save(params, Target(config=config), tmp_path / "later", most_bytes=float("inf"))
    for leaf in jax.tree.leaves(params):
        leaf.delete()
    assert not (tmp_path / "later").exists()
    write_fn()
    assert read_tensors(tmp_path / "later") == read_tensors(tmp_path / "now")


def test_what_the_host_cannot_hold_is_written_at_once(tmp_path):
    params, config = load(make_checkpoint(tmp_path / "hf", "llama"))
    begin_save(params, Target(config=config), tmp_path / "out", most_bytes=1)
    assert find_damage(tmp_path / "out") is None


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    params, config = load(make_checkpoint(tmp_path / "hf", "llama"))
    out = tmp_path / "out"
    save_hf(params, config, out)
    before = read_tensors(out)

    def full(file, shard):
        raise OSError("no space left")

    monkeypatch.setattr(save, "_write_header", full)
    with pytest.raises(OSError, match="no space left"):
        save_hf(params, config, out)
    assert read_tensors(out) == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["hf", "out"]


def test_what_a_killed_save_left_is_swept(tmp_path):
    params, config = load(make_checkpoint(tmp_path / "hf", "llama"))
    (tmp_path / ".out.writing").mkdir()
    (tmp_path / ".out.writing" / "model.safetensors").write_text("half")
    save_hf(params, config, tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["hf", "out"]


def test_an_unwritable_place_and_wrong_layers_are_refused(tmp_path):
    params, config = load(make_checkpoint(tmp_path / "hf", "llama"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Not a directory|File exists"):
        save_hf(params, config, tmp_path / "file" / "out")
    short = jax.tree.map(lambda x: x[:3] if x.shape[0] == 4 else x, params)
    with pytest.raises(ValueError, match="has 3 layers, the model config 4"):
        save_hf(short, config, tmp_path / "out")


def test_random_parameters_without_a_source_keep_their_dtype(tmp_path):
    _, config = load(make_checkpoint(tmp_path / "hf", "qwen3"))
    model = build_model(config)
    params = init_params(model, on_one_device(model), seed=0, dtype=jnp.bfloat16)
    save_hf(params, config, tmp_path / "out")
    again = load_params(tmp_path / "out", model, on_one_device(model), dtype=jnp.bfloat16)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), params, again)))


def test_a_checkpoint_names_what_ended_its_texts_and_transformers_stops_there(tmp_path):
    """The tokenizer's EOS is not the one that the source's files name: left as they are, generation runs on past it."""
    import torch
    from transformers import AutoModelForCausalLM

    source = make_checkpoint(tmp_path / "hf", "llama", config={"eos_token_id": 5})
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 5, "max_length": 99}))
    params, config = load(source)
    prompt = torch.arange(10, 14)[None]
    tokens = AutoModelForCausalLM.from_pretrained(source).generate(prompt, max_new_tokens=24, do_sample=False)[0, 4:]
    end = next(int(token) for i, token in enumerate(tokens) if i >= 3 and token not in tokens[:i])
    stop = tokens.tolist().index(end) + 1
    assert stop < len(tokens)
    for number, generation in enumerate(("kept", "without eos", "none")):
        if generation == "without eos":
            (source / "generation_config.json").write_text("{}")
        elif generation == "none":
            (source / "generation_config.json").unlink()
        out = tmp_path / f"out{number}"
        save_hf(params, config, out, source_dir=source, ends=EndTokens(ids=(end, 5)))
        model = AutoModelForCausalLM.from_pretrained(out)
        assert model.config.eos_token_id == model.generation_config.eos_token_id == [end, 5]
        answer = model.generate(prompt, max_new_tokens=24, do_sample=False)[0, 4:]
        assert answer.tolist() == tokens[:stop].tolist()
    assert json.loads((tmp_path / "out0" / "generation_config.json").read_text())["max_length"] == 99
    # Files that name the same are kept to the letter.
    save_hf(params, config, tmp_path / "same", source_dir=source, ends=EndTokens(ids=(5,)))
    assert (tmp_path / "same" / "config.json").read_text() == (source / "config.json").read_text()


@pytest.mark.parametrize(
    ("pad", "own", "saved"),
    [(1, 1, None), (1, None, None), (0, 1, None), (0, None, 0), (0, 0, 0), (0, 7, 7), (None, 7, None), (5, 7, None)],
)
def test_a_critic_is_scored_by_transformers_at_the_token_that_ended_its_texts(pad, own, saved, tmp_path):
    """Its padding may be the tokenizer's EOS and not config's, or another token than the tokenizer pads with."""
    import torch
    from transformers import AutoModelForSequenceClassification

    source = make_checkpoint(tmp_path / "hf", "llama")
    edit_config(source, pad_token_id=pad, eos_token_id=5)
    model = build_model(load_config(source).as_critic())
    fresh = {"head/kernel": make_fill("head/kernel", (32, 1), seed=3)}
    params = load_params(source, model, on_one_device(model), fresh=fresh)
    save_hf(params, model.config, tmp_path / "out", source_dir=source, ends=EndTokens(ids=(1, 5), pad=own))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["pad_token_id"], written["eos_token_id"], written["scored_end_token_id"]) == (saved, [1, 5], 1)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    tokens = torch.tensor([[9, 8, 10, 11, 1]])
    with torch.no_grad():
        at_end = theirs.score(theirs.model(tokens).last_hidden_state)[0, -1].item()
        assert theirs(tokens).logits.item() == pytest.approx(at_end)
        if saved is not None:
            padded = torch.nn.functional.pad(tokens, (0, 2), value=saved if own is None else own)
            assert theirs(padded, attention_mask=(padded != saved).long()).logits.item() == pytest.approx(at_end)


def test_a_checkpoint_has_the_whole_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    templates = {"default": "{{ messages }}", "tool_use": "{{ messages }} with tools"}
    source = make_checkpoint(tmp_path / "hf", "llama")
    make_tokenizer(chat_template=templates).save_pretrained(source)
    assert (source / "additional_chat_templates" / "tool_use.jinja").is_file()
    for name in ("sentencepiece.bpe.model", "qwen.tiktoken", "vocab.txt", "tokenization_mine.py"):
        (source / name).write_text(name)
    (tmp_path / "out").mkdir()
    write_config(load_config(source), tmp_path / "out", source, np.dtype("float32"))
    files = lambda folder: {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files(tmp_path / "out") == files(source) - {"model.safetensors"}
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == templates
