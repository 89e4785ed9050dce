"""What transformers keeps in float32 of a model in bfloat16 is so in all our copies: routers that have an offset."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from realjax.core.axes import generate_rules, train_rules, tree_shardings
from realjax.core.compute import Compute
from realjax.core.generation_config import GenerationConfig
from realjax.core.trees import flatten_paths
from realjax.engine.forward import make_compute_copy
from realjax.engine.sampling import Sampler
from realjax.engine.slots import SlotPrograms
from realjax.hf.families import find_family
from realjax.hf.load import load_config, load_params
from realjax.hf.pieces import find_pieces
from realjax.models.build import build_model
from realjax.models.config import LayerKind, MoEConfig
from realjax.models.moe import Router
from realjax.models.products import Products
from realjax.reshard.apply import reshard
from tests.given.checkpoints import make_checkpoint
from tests.given.models import make_layout, make_model, on_one_device, place_params, quick_jit, random_tree

MOE = MoEConfig(num_experts=8, experts_per_token=3, expert_size=12, scores="sigmoid", has_offset=True)
MODEL = make_model(pattern=(LayerKind(name="dense"), LayerKind(name="sparse", feed_forward=MOE)), num_layers=4)
BF16 = jnp.dtype("bfloat16")


@pytest.mark.parametrize("kind", ["glm4_moe", "gpt_oss", "mixtral"])
def test_the_tensors_are_those_of_transformers(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    source = make_checkpoint(tmp_path / "hf", kind)
    model = build_model(load_config(source))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="bfloat16")
    wide = {name for name, x in theirs.state_dict().items() if str(x.dtype) == "torch.float32"}
    copy = flatten_paths(load_params(source, model, on_one_device(model), dtype=BF16))
    shapes = {path: leaf.shape for path, leaf in copy.items()}
    pieces = find_pieces(find_family(kind), model.config, shapes)
    assert {piece.name for piece in pieces if copy[piece.path].dtype == np.float32} == wide
    assert bool(wide) == (kind == "glm4_moe")


def test_every_copy_has_the_bits_of_the_masters():
    layout = make_layout()
    masters = random_tree(MODEL)
    params = place_params(MODEL, masters, layout, train_rules(layout.strategy))
    shardings = tree_shardings(MODEL.axes, MODEL.abstract, generate_rules(layout.strategy), layout)
    config = GenerationConfig(max_new_tokens=1, min_new_tokens=0, greedy=True)
    programs = SlotPrograms(MODEL, layout, Sampler(config=config, eos_ids=(5,), seed=0), 2, Compute(dtype="bfloat16"))
    made = programs.prepare(params)["layers"]
    copies = {
        "call": quick_jit(make_compute_copy(MODEL, train_rules(layout.strategy), layout, BF16))(params),
        "move": reshard(params, shardings, dtype=MODEL.copy_dtypes(BF16))[0],
        "slots": {"layers": {"sparse": jax.tree.map(lambda *x: jnp.stack(x), *made[1::2])}},
    }
    for name, copy in copies.items():
        for path, leaf in flatten_paths(copy).items():
            expected = flatten_paths(masters)[path]
            assert (leaf.dtype == np.float32) == ("/mlp/router/" in path), (name, path)
            np.testing.assert_array_equal(leaf, expected.astype(leaf.dtype), err_msg=f"{name}: {path}")


def test_scores_are_not_rounded_on_their_way_to_the_choice():
    """Offsets of 1 and a little more, which bfloat16 cannot tell apart."""
    rng = np.random.default_rng(0)
    kernel, offset = rng.standard_normal((32, 8)) * 1e-3, 1 + rng.permutation(8) * 1e-3
    params = {"kernel": jnp.asarray(kernel, jnp.float32), "offset": jnp.asarray(offset, jnp.float32)}
    router = nnx.merge(nnx.graphdef(Router(MODEL.config, MOE)), params)
    x = jnp.asarray(rng.standard_normal((2, 9, 32)), BF16)
    logits = router(x, Products())
    wide = np.asarray(x, np.float64) @ np.asarray(params["kernel"], np.float64)
    np.testing.assert_allclose(logits, wide, rtol=1e-5, atol=1e-8)
    scores = 1 / (1 + np.exp(-wide)) + np.asarray(params["offset"], np.float64)
    np.testing.assert_array_equal(router.choose(logits), np.argsort(-scores, axis=-1)[..., :3])
