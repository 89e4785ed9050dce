"""Random transformers models, and their weights and gradients under our names."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from jax import Array
from transformers.core_model_loading import revert_weight_conversion

from realjax.core.trees import Tree, flatten_paths, unflatten_paths
from realjax.hf.families import FAMILIES, config_from_hf, find_family
from realjax.hf.pieces import find_pieces, group_by_leaf, list_tensors, read_leaf
from realjax.models.attention import AttentionFn
from realjax.models.build import Model, build_model
from realjax.models.config import ModelConfig
from realjax.models.heads import cap_logits
from realjax.models.transformer import Forward
from tests.given.models import KINDS, SIZES

torch = pytest.importorskip("torch")
# A padding token would have no gradient there; and the published one may lie beyond a tiny vocabulary.
TWO_LAYERS = {**SIZES, "num_hidden_layers": 2, "pad_token_id": None}
torch.set_num_threads(1)  # its threads would fight with those of the other test processes


def make_theirs(kind: str, **changes) -> transformers.PreTrainedModel:
    """Returns a random float32 model of `kind` whose norms and biases are random too."""
    model_type, keys = KINDS[kind]
    config = transformers.AutoConfig.for_model(model_type, **{**TWO_LAYERS, **keys, **changes})
    return randomize(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"))


def make_their_critic(
    kind: str,
) -> tuple[transformers.PreTrainedModel, Callable[[np.ndarray], np.ndarray]]:
    """Returns a random classifier of one label, and its scores `[T, 1]` of the tokens of a sequence.

    Where transformers has no such class, it is the trunk of the language model and a matrix of the same name.
    """
    model_type, keys = KINDS[kind]
    critic = {"num_labels": 1, "architectures": [FAMILIES[model_type].critic_class]}
    config = transformers.AutoConfig.for_model(model_type, **{**TWO_LAYERS, **keys, **critic})
    if hasattr(transformers, FAMILIES[model_type].critic_class):
        theirs = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    else:
        theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        del theirs.lm_head
        theirs.score = torch.nn.Linear(config.hidden_size, 1, bias=False)

    def score(tokens: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            hidden = theirs.base_model(torch.from_numpy(tokens).long()[None])[0]
            return np.asarray(theirs.score(hidden)[0])

    return randomize(theirs), score


def list_stored(theirs: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """Returns what a model's checkpoints have: its parameters once each, and buffers such as offsets of routers."""
    stored = theirs.state_dict()
    buffers = {name: buffer for name, buffer in theirs.named_buffers() if name in stored}
    return {**dict(theirs.named_parameters()), **buffers}


def randomize(theirs: transformers.PreTrainedModel, scale: float = 0.2) -> transformers.PreTrainedModel:
    """Draws every parameter anew, norms around 1; small enough for float32 to hold logits to 1e-5."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in list_stored(theirs).items():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale + ("norm" in name))
    return theirs.float().eval()


def make_ours(theirs: transformers.PreTrainedModel, config: ModelConfig | None = None) -> tuple[Model, Tree]:
    """Returns our model of `config` (of theirs by default), and their weights in our tree (host arrays)."""
    model = build_model(config or config_from_hf(theirs.config.to_dict(), "config"))
    return model, to_ours(model, name_tensors(theirs, list_stored(theirs)))


def name_tensors(theirs: transformers.PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Returns a model's tensors (weights or gradients) as its checkpoints have them: not fused as in memory."""
    detached = {name: tensor.detach() for name, tensor in tensors.items()}
    return {name: tensor.numpy() for name, tensor in revert_weight_conversion(theirs, detached).items()}


def to_ours(model: Model, named: dict[str, np.ndarray]) -> Tree:
    """Returns arrays under HuggingFace names (weights or gradients) as our tree."""
    shapes = {path: leaf.shape for path, leaf in flatten_paths(model.abstract).items()}
    pieces = find_pieces(find_family(model.config.family), model.config, shapes)
    assert {tensor.name for tensor in list_tensors(pieces)} == named.keys()
    whole = lambda shape: tuple(slice(0, size) for size in shape)
    read = lambda name, window: named[name][window]
    return unflatten_paths(
        {
            path: read_leaf(parts, read, whole(shapes[path]), np.dtype(np.float32))
            for path, parts in group_by_leaf(pieces).items()
        }
    )


def our_logits(model: Model, params: Tree, batch, attention_fn: AttentionFn) -> Array:
    """Returns logits `[R, T, V]`."""
    transformer = model.bind(params)
    forward = Forward(attention_fn=attention_fn)
    hidden, _ = transformer(batch["tokens"], batch["positions"], batch["segment_ids"], forward)
    logits = jnp.einsum("RTD,DV->RTV", hidden, transformer.head_kernel())
    return logits if model.config.is_critic else cap_logits(logits, model.config.logit_softcap)


def their_logits(theirs: transformers.PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
    """Returns logits `[T, V]` of one sequence alone."""
    with torch.no_grad():
        return theirs(torch.from_numpy(tokens).long()[None]).logits[0].numpy()


def their_gradients(
    theirs: transformers.PreTrainedModel, examples: list[dict[str, np.ndarray]]
) -> tuple[float, dict[str, np.ndarray]]:
    """Returns the answers' mean nll over a right-padded batch, and its gradients under HuggingFace names."""
    pad = lambda key: torch.nn.utils.rnn.pad_sequence([torch.from_numpy(e[key]) for e in examples], batch_first=True)
    tokens, mask = pad("tokens").long(), pad("loss_mask")
    attention_mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(e["tokens"])) for e in examples], batch_first=True)
    theirs.zero_grad()
    logits = theirs(tokens, attention_mask=attention_mask).logits
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    loss = (nll * mask[:, 1:]).sum() / mask[:, 1:].sum()
    loss.backward()
    grads = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    return loss.item(), name_tensors(theirs, grads)
