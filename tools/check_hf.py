"""Our forward pass of a checkpoint, and what we generate, beside those of transformers, on a text."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from realjax.core.axes import generate_rules, tree_shardings
from realjax.core.compute import Compute
from realjax.core.generation_config import GenerationConfig
from realjax.core.layout import Layout, ParallelStrategy
from realjax.core.trees import Tree
from realjax.engine.attention.blocked import blocked_attention
from realjax.engine.batching import Request, generate
from realjax.engine.sampling import Sampler
from realjax.engine.slots import SlotPrograms
from realjax.hf.families import find_family
from realjax.hf.files import CheckpointFiles
from realjax.models.build import Model, build_model
from realjax.models.config import ModelConfig
from realjax.models.products import Products
from realjax.models.transformer import Forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEXT = "The film was slow at first. By the end nobody in the room wanted it to stop, and we talked about it for hours."
# Of the largest of theirs. Float32 sums in another order differ by less, also over many layers.
MOST = 1e-3
NUM_NEW = 32  # tokens that are generated after the text, where the model has positions for as many


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Logits (of a critic scores) `[T, V]` of a text's tokens in float32."""

    tokens: np.ndarray
    ours: np.ndarray
    theirs: np.ndarray
    generated: tuple[np.ndarray, np.ndarray]  # greedy tokens after the text, ours and theirs; none of a critic
    seconds: tuple[float, float]  # of all that is ours, compilation included, and of theirs

    @property
    def error(self) -> float:
        """The largest difference, of the largest of theirs."""
        return float(np.abs(self.ours - self.theirs).max() / np.abs(self.theirs).max())

    def describe(self) -> str:
        """Returns one line of what was compared."""
        line = f"{len(self.tokens)} tokens: outputs differ from transformers' by {self.error:.1e} of the largest"
        if self.ours.shape[1] > 1:
            agree = int((self.ours.argmax(axis=1) == self.theirs.argmax(axis=1)).sum())
            ours, theirs = (perplexity(logits, self.tokens) for logits in (self.ours, self.theirs))
            line += f", the likeliest token is the same at {agree}; perplexity {ours:.6g}, theirs {theirs:.6g}"
        if num_new := len(self.generated[0]):
            is_same = np.cumprod(self.generated[0] == self.generated[1])
            line += f"; of {num_new} greedy tokens after it the first {is_same.sum()} are the same"
        return f"{line}; {self.seconds[0]:.1f} s, theirs {self.seconds[1]:.1f} s"


def check_hf(directory: Path, config: ModelConfig, params: Tree, text: str) -> Compared:
    """Compares parameters, rounded as the files are, with the HuggingFace directory that they are from or went to.

    Both compute in float32. An empty `text` takes one of ours. Raises ValueError where the outputs differ, or where
    transformers has no such model. Greedy tokens are counted only: two may be as likely, but for rounding.
    """
    tokens = read_tokens(directory, config, text or TEXT)
    start = time.monotonic()
    stored = CheckpointFiles.open(directory).dtype
    model, rounded = build_model(config), jax.tree.map(lambda x: x.astype(stored).astype(jnp.float32), params)
    num_new = 0 if config.is_critic else min(NUM_NEW, config.max_positions - len(tokens))
    ours, generated = compute_outputs(model, rounded, tokens), continue_text(model, rounded, tokens, num_new)
    middle = time.monotonic()
    them = load_theirs(directory, config)
    theirs, also_generated = compute_theirs(them, config, tokens), continue_theirs(them, tokens, num_new)
    seconds = middle - start, time.monotonic() - middle
    compared = Compared(tokens=tokens, ours=ours, theirs=theirs, generated=(generated, also_generated), seconds=seconds)
    if not compared.error <= MOST:
        raise ValueError(f"--check: '{directory}': {compared.describe()}; at most {MOST:.0e} is rounding")
    return compared


def read_tokens(directory: Path, config: ModelConfig, text: str) -> np.ndarray:
    """Returns the text's tokens `[T]`, of a directory without a tokenizer as many at random."""
    from transformers import AutoTokenizer

    if any((directory / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        tokens = np.asarray(AutoTokenizer.from_pretrained(directory)(text)["input_ids"])
    else:
        tokens = np.random.default_rng(0).integers(config.vocab_size, size=64)
    if len(tokens) < 2 or tokens.max() >= config.vocab_size:
        raise ValueError(f"--check: '{directory}': the text is {tokens.tolist()[:8]}; it needs 2 tokens of the model's")
    return tokens[: config.max_positions].astype(np.int32)


def compute_outputs(model: Model, params: Tree, tokens: np.ndarray) -> np.ndarray:
    """Returns our logits `[T, V]` of a text, of a critic its scores `[T, 1]`, in the parameters' dtype."""
    forward = Forward(attention_fn=blocked_attention)

    @jax.jit
    def run(params: Tree, row: Array) -> Array:
        bound = model.bind(params)
        hidden, _ = bound(row, jnp.arange(row.shape[1])[None], jnp.ones_like(row), forward)
        return bound.next_logits(hidden[0], Products())

    return np.asarray(run(params, jnp.asarray(tokens)[None]))


def continue_text(model: Model, params: Tree, tokens: np.ndarray, num_new: int) -> np.ndarray:
    """Returns the `num_new` greedy tokens after a text `[T]`, as `realjax gen` makes them; none ends it."""
    if not num_new:
        return np.zeros(0, np.int32)
    config = GenerationConfig(max_new_tokens=num_new, min_new_tokens=0, greedy=True)
    layout = Layout.of(ParallelStrategy(), jax.devices()[:1])
    programs = SlotPrograms(model, layout, Sampler(config=config, eos_ids=(), seed=0), 1, Compute())
    shardings = tree_shardings(model.axes, model.abstract, generate_rules(layout.strategy), layout)
    (found,) = generate(programs, jax.device_put(params, shardings), [Request(tokens=tokens, row_id=0)])
    return found.tokens


def load_theirs(directory: Path, config: ModelConfig) -> "PreTrainedModel":
    """Returns the directory's model in transformers, in float32. Raises ValueError where it has no such class."""
    import transformers

    try:
        import torch
    except ImportError as error:
        raise ValueError("--check: transformers needs PyTorch; pip install 'realjax[torch]'") from error
    family = find_family(config.family)
    name = family.critic_class if config.is_critic else family.causal_class
    if not hasattr(transformers, name):
        raise ValueError(f"--check: '{directory}': this version of transformers has no {name} to compare with")
    return getattr(transformers, name).from_pretrained(directory, dtype=torch.float32).eval()


def compute_theirs(them: "PreTrainedModel", config: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    """Returns transformers' logits `[T, V]` of a text, of a critic its scores `[T, 1]`."""
    import torch

    with torch.no_grad():
        row = torch.from_numpy(tokens).long()[None]
        found = them.get_submodule("score")(them.base_model(row)[0]) if config.is_critic else them(row).logits
    return found[0].numpy()


def continue_theirs(them: "PreTrainedModel", tokens: np.ndarray, num_new: int) -> np.ndarray:
    """Returns transformers' `num_new` greedy tokens after a text `[T]`; none ends it."""
    if not num_new:
        return np.zeros(0, np.int32)
    import torch
    import transformers

    them.generation_config = transformers.GenerationConfig(max_new_tokens=num_new, do_sample=False, pad_token_id=0)
    row = torch.from_numpy(tokens).long()[None]
    # Every language model's class has it, but not their common one.
    whole = cast(Any, them).generate(row, attention_mask=torch.ones_like(row))
    return whole[0, len(tokens) :].numpy()


def perplexity(logits: np.ndarray, tokens: np.ndarray) -> float:
    """Returns exp of the mean negative log-likelihood of all tokens but the first."""
    losses = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits[:-1]), jnp.asarray(tokens[1:]))
    return math.exp(float(losses.mean()))
