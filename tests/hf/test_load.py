import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from realjax.core.axes import train_rules, tree_shardings
from realjax.core.layout import Layout, ParallelStrategy
from realjax.core.trees import flatten_paths, num_params
from realjax.hf.files import SafetensorsFile
from realjax.hf.load import check_weights, correct_config, has_critic_head, load_config, load_params
from realjax.hf.save import save_hf
from realjax.models.build import build_model, make_fill
from tests.given.checkpoints import edit_config, edit_tensors, make_bin, make_checkpoint
from tests.given.models import KINDS, on_one_device

STRATEGIES = [
    ParallelStrategy(dp=4, tp=2, zero_stage=3),
    ParallelStrategy(dp=2, tp=4),
    ParallelStrategy(dp=2, pp=4, zero_stage=3),
]


def shardings_in(model, strategy):
    layout = Layout.of(strategy)
    return tree_shardings(model.axes, model.abstract, train_rules(strategy), layout)


def assert_trees_equal(a, b):
    a, b = flatten_paths(a), flatten_paths(b)
    assert a.keys() == b.keys()
    for path, leaf in a.items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(b[path]), err_msg=path)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize("kind", ["llama-biases", "qwen3"])
def test_a_sharded_load_holds_the_same_values_in_the_asked_places(kind, strategy, tmp_path):
    source = make_checkpoint(tmp_path / "hf", kind, dtype="bfloat16")
    model = build_model(load_config(source))
    shardings = shardings_in(model, strategy)
    params = load_params(source, model, shardings)
    assert_trees_equal(params, load_params(source, model, on_one_device(model)))
    for path, leaf in flatten_paths(params).items():
        assert leaf.sharding == flatten_paths(shardings)[path] and leaf.dtype == jnp.float32


@pytest.mark.parametrize("kind", KINDS)
def test_the_tree_is_the_models_and_casts_exactly(kind, tmp_path):
    source = make_checkpoint(tmp_path / "hf", kind, dtype="bfloat16")
    model = build_model(load_config(source))
    params = load_params(source, model, on_one_device(model))
    assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, model.abstract)
    assert_trees_equal(params, load_params(source, model, on_one_device(model), dtype=jnp.bfloat16))


def test_formats_load_alike(tmp_path):
    source = make_checkpoint(tmp_path / "hf", "qwen2")
    model = build_model(load_config(source))
    params = load_params(source, model, on_one_device(model))
    assert_trees_equal(
        params, load_params(make_bin(source, tmp_path / "bin", num_files=2), model, on_one_device(model))
    )


def test_every_number_is_read_once_however_many_replicas(tmp_path, monkeypatch):
    source = make_checkpoint(tmp_path / "hf", "llama")
    model = build_model(load_config(source))
    read = SafetensorsFile.read
    num_read = []

    def counted(file, name, window):
        part = read(file, name, window)
        num_read.append(part.size)
        return part

    monkeypatch.setattr(SafetensorsFile, "read", counted)
    load_params(source, model, shardings_in(model, ParallelStrategy(dp=4, tp=2)))
    assert sum(num_read) == num_params(model.abstract)


def test_a_loaded_tree_can_be_donated(tmp_path):
    source = make_checkpoint(tmp_path / "hf", "llama")
    model = build_model(load_config(source))
    params = load_params(source, model, on_one_device(model))
    jax.block_until_ready(jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(params))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_a_critic_takes_the_trunk_of_a_language_model_and_a_fresh_head(tmp_path):
    for kind in ("llama", "llama-tied"):
        source = make_checkpoint(tmp_path / kind, kind)
        model = build_model(load_config(source).as_critic())
        fill = make_fill("head/kernel", (32, 1), seed=3)
        params = load_params(source, model, on_one_device(model), fresh={"head/kernel": fill})
        np.testing.assert_array_equal(params["head"]["kernel"], fill((slice(None), slice(None))))
        assert not has_critic_head(source)
        with pytest.raises(ValueError, match="lacks 'score.weight'|takes 'lm_head.weight'"):
            load_params(source, model, on_one_device(model))


def test_a_saved_critic_keeps_its_head_under_either_name(tmp_path):
    source = make_checkpoint(tmp_path / "hf", "llama", task="SequenceClassification", config={"num_labels": 1})
    model = build_model(load_config(source))
    params = load_params(source, model, on_one_device(model))
    score = load_file(source / "model.safetensors")["score.weight"]
    np.testing.assert_array_equal(params["head"]["kernel"], score.T)
    assert has_critic_head(source)
    edit_tensors(source, lambda t: {k.replace("score", "lm_head"): x for k, x in t.items()})  # as ReaL writes it
    assert has_critic_head(source)
    assert_trees_equal(params, load_params(source, model, on_one_device(model)))
    fill = make_fill("head/kernel", (32, 1), seed=3)
    anew = load_params(source, model, on_one_device(model), fresh={"head/kernel": fill})
    np.testing.assert_array_equal(anew["head"]["kernel"], fill((slice(None), slice(None))))


def test_a_tied_checkpoint_may_hold_the_table_twice(tmp_path):
    source = make_checkpoint(tmp_path / "hf", "llama-tied")
    model = build_model(load_config(source))
    params = load_params(source, model, on_one_device(model))
    edit_tensors(source, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].copy()})
    assert_trees_equal(params, load_params(source, model, on_one_device(model)))


def logits_of(directory):
    """Returns transformers' logits of a few tokens."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    return model(torch.arange(12)[None]).logits.detach().numpy()


def test_a_head_of_its_own_is_kept_where_the_config_says_tied_as_in_transformers(tmp_path):
    source = make_checkpoint(tmp_path / "hf", "llama-tied")
    own = np.random.default_rng(0).standard_normal((64, 32), np.float32)
    edit_tensors(source, lambda t: {**t, "lm_head.weight": own})
    assert load_config(source).tied and not correct_config(load_config(source), source).tied
    model = build_model(correct_config(load_config(source), source))
    params = load_params(source, model, on_one_device(model))
    np.testing.assert_array_equal(params["head"]["kernel"], own.T)
    save_hf(params, model.config, tmp_path / "out", source_dir=source)
    assert not load_config(tmp_path / "out").tied
    np.testing.assert_array_equal(logits_of(tmp_path / "out"), logits_of(source))
    table = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(source, lambda t: {**t, "lm_head.weight": table.copy()})
    assert correct_config(load_config(source), source).tied


def test_a_tied_table_may_have_the_heads_name_as_in_transformers(tmp_path):
    source = make_checkpoint(tmp_path / "hf", "llama-tied")
    model = build_model(correct_config(load_config(source), source))
    params, theirs = load_params(source, model, on_one_device(model)), logits_of(source)
    edit_tensors(source, lambda t: {n.replace("model.embed_tokens", "lm_head"): x for n, x in t.items()})
    assert_trees_equal(params, load_params(source, model, on_one_device(model)))
    np.testing.assert_array_equal(logits_of(source), theirs)


def test_the_weights_are_checked_by_their_heads_alone(tmp_path):
    source = make_checkpoint(tmp_path / "hf", "llama")
    config = load_config(source)
    check_weights(source, config)
    check_weights(source, config.as_critic(), has_new_head=True)
    with pytest.raises(ValueError, match="lacks 'score.weight'"):
        check_weights(source, config.as_critic())
    edit_config(source, num_hidden_layers=5)
    with pytest.raises(ValueError, match="lacks 9 tensors: 'model.layers.4"):
        check_weights(source, load_config(source))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: {**t, "extra.weight": np.zeros(2, np.float32)}, "nothing in the model takes 'extra.weight'"),
        (lambda t: {k: x for k, x in t.items() if "3.mlp.up" not in k}, "lacks 'model.layers.3.mlp.up_proj.weight'"),
        (lambda t: {**t, "model.norm.weight": np.zeros(2, np.float32)}, r"has shape \[2\], the model needs \[32\]"),
        (lambda t: {**t, "model.norm.weight": np.zeros(32, np.int8)}, "'model.norm.weight' is stored as I8"),
    ],
)
def test_tensors_that_are_not_the_models_are_refused(change, message, tmp_path):
    source = make_checkpoint(tmp_path / "hf", "llama")
    model = build_model(load_config(source))
    edit_tensors(source, change)
    with pytest.raises(ValueError, match=message):
        load_params(source, model, on_one_device(model))


def test_a_config_of_another_model_is_refused(tmp_path):
    source = make_checkpoint(tmp_path / "hf", "llama")
    edit_config(source, attention_bias=True)
    model = build_model(load_config(source))
    with pytest.raises(ValueError, match="lacks 16 tensors: 'model.layers.0.self_attn.q_proj.bias'"):
        load_params(source, model, on_one_device(model))
    with pytest.raises(ValueError, match="does not exist"):
        load_config(tmp_path)
