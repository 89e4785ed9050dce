"""Our forward pass of a checkpoint beside that of transformers, on a text."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from realjax.core.trees import Tree
from realjax.engine.attention.blocked import blocked_attention
from realjax.hf.families import find_family
from realjax.hf.files import CheckpointFiles
from realjax.models.build import Model, build_model
from realjax.models.config import ModelConfig
from realjax.models.products import Products
from realjax.models.transformer import Forward

TEXT = "The film was slow at first. By the end nobody in the room wanted it to stop, and we talked about it for hours."
# Of the largest of theirs. Float32 sums in another order differ by less, also over many layers.
MOST = 1e-3


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Logits (of a critic scores) `[T, V]` of a text's tokens in float32."""

    tokens: np.ndarray
    ours: np.ndarray
    theirs: np.ndarray
    seconds: tuple[float, float]  # of our pass, compilation included, and of theirs

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
        return f"{line}; {self.seconds[0]:.1f} s, theirs {self.seconds[1]:.1f} s"


def check_hf(directory: Path, config: ModelConfig, params: Tree, text: str) -> Compared:
    """Compares parameters, rounded as the files are, with the HuggingFace directory that they are from or went to.

    Both compute in float32. An empty `text` takes one of ours. Raises ValueError where the outputs differ, or where
    transformers has no such model.
    """
    tokens = read_tokens(directory, config, text or TEXT)
    start = time.monotonic()
    stored = CheckpointFiles.open(directory).dtype
    ours = compute_outputs(build_model(config), jax.tree.map(lambda x: x.astype(stored), params), tokens)
    middle = time.monotonic()
    theirs = compute_theirs(directory, config, tokens)
    seconds = middle - start, time.monotonic() - middle
    compared = Compared(tokens=tokens, ours=ours, theirs=theirs, seconds=seconds)
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
    """Returns our logits `[T, V]` of a text, of a critic its scores `[T, 1]`."""
    forward = Forward(attention_fn=blocked_attention)

    @jax.jit
    def run(params: Tree, row: Array) -> Array:
        bound = model.bind(jax.tree.map(lambda x: x.astype(jnp.float32), params))
        hidden, _ = bound(row, jnp.arange(row.shape[1])[None], jnp.ones_like(row), forward)
        return bound.next_logits(hidden[0], Products())

    return np.asarray(run(params, jnp.asarray(tokens)[None]))


def compute_theirs(directory: Path, config: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    """Returns transformers' logits `[T, V]` of the directory's model, of a critic its scores `[T, 1]`."""
    import transformers

    try:
        import torch
    except ImportError as error:
        raise ValueError("--check: transformers needs PyTorch; pip install 'realjax[torch]'") from error
    family = find_family(config.family)
    name = family.critic_class if config.is_critic else family.causal_class
    if not hasattr(transformers, name):
        raise ValueError(f"--check: '{directory}': this version of transformers has no {name} to compare with")
    theirs = getattr(transformers, name).from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        row = torch.from_numpy(tokens).long()[None]
        found = theirs.score(theirs.base_model(row)[0]) if config.is_critic else theirs(row).logits
    return found[0].numpy()


def perplexity(logits: np.ndarray, tokens: np.ndarray) -> float:
    """Returns exp of the mean negative log-likelihood of all tokens but the first."""
    losses = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits[:-1]), jnp.asarray(tokens[1:]))
    return math.exp(float(losses.mean()))
