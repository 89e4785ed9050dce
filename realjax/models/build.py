"""From a config to a model: its recipe, the abstract tree of its parameters, and random values for them."""

import math
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import chain
from typing import cast

import jax
import numpy as np
from flax import nnx
from jax.sharding import Sharding
from jax.typing import DTypeLike

from realjax.core.trees import Tree, flatten_paths, map_paths, num_params, select_paths
from realjax.models.config import LayerKind, ModelConfig
from realjax.models.lora import is_adapter
from realjax.models.stacks import join_kinds
from realjax.models.transformer import FEED_FORWARDS, Block, Transformer


@dataclass(frozen=True, eq=False)
class Model:
    """An architecture, built once and used in every layout. Parameters are a plain nested dict beside it."""

    config: ModelConfig
    graphdef: nnx.GraphDef
    abstract: Tree  # jax.ShapeDtypeStruct leaves, float32
    axes: Tree  # tuples of logical axis names

    @property
    def num_params(self) -> int:
        """Scalars in the model's parameters, without those of empty layers."""
        config = self.config
        per_layer = num_params(self.abstract["layers"]) // config.num_stacked_layers
        return num_params(self.abstract) - config.num_empty_layers * per_layer

    @property
    def num_active_params(self) -> int:
        """Those of `num_params` that multiply a token: of experts only the token's own."""
        config, moe = self.config, self.config.experts
        if moe is None:
            return self.num_params
        of_experts = sum(leaf.size for path, leaf in flatten_paths(self.abstract).items() if "/mlp/experts/" in path)
        of_experts = of_experts * config.num_layers // config.num_stacked_layers
        return self.num_params - of_experts * (moe.num_experts - moe.experts_per_token) // moe.num_experts

    @property
    def num_trained_params(self) -> int:
        """Those of `num_params` that training changes."""
        return self.num_params if self.config.lora is None else num_params(self.take_trained(self.abstract))

    def is_trained(self, path: str) -> bool:
        """Returns whether training changes the parameter at a path: with adapters these alone, and a critic's head."""
        return self.config.lora is None or is_adapter(path) or (self.config.is_critic and path == "head/kernel")

    def take_trained(self, tree: Tree) -> Tree:
        """Returns what a tree has for the parameters that training changes."""
        return tree if self.config.lora is None else select_paths(self.is_trained, tree)

    def take_frozen(self, tree: Tree) -> Tree:
        """Returns what a tree has for the parameters that training leaves as they are."""
        return select_paths(lambda path: not self.is_trained(path), tree)

    def copy_dtype(self, path: str, dtype: DTypeLike) -> np.dtype:
        """Returns the type of the parameter at a path in a copy that programs compute with in `dtype`.

        Routers that choose by sigmoids and an offset stay float32, as in transformers: their scores lie close together.
        """
        has_offset = self.config.experts is not None and self.config.experts.has_offset
        return np.dtype(np.float32 if has_offset and "/mlp/router/" in path else dtype)

    def copy_dtypes(self, dtype: DTypeLike) -> Tree:
        """Returns the tree of `copy_dtype`."""
        return map_paths(lambda path, _: self.copy_dtype(path, dtype), self.abstract)

    def bind(self, params: Tree) -> Transformer:
        """Returns the module with these parameters, ready to be called inside a jitted function."""
        return nnx.merge(self.graphdef, params)

    def bind_layers(self, params: Tree) -> tuple[Transformer, list[Block]]:
        """Returns the module and its blocks one by one, of parameters whose `layers` is a list of trees, one for each.

        A loop that reads every weight once a token cannot afford a slice of a stack in front of each product.
        The module's own `layers` are the first block of each kind: only embedding, final norm and head may be used.
        """
        layers, order = params["layers"], self.config.order
        firsts = {name: layers[order.index(name)] for name in self.config.kinds}
        transformer = self.bind({**params, "layers": join_kinds(firsts)})
        graphdefs = {name: nnx.graphdef(block) for name, block in transformer.stacks.items()}
        return transformer, [nnx.merge(graphdefs[name], layer) for name, layer in zip(order, layers)]

    def count_terms(self) -> dict[str, int]:
        """Returns how many layers have each of the terms that blocks add to the loss or report, see `models.stacks`."""
        return dict(Counter(chain.from_iterable(self._list_terms(kind) for kind in self.config.layers)))

    def term_coefs(self) -> dict[str, float]:
        """Returns the coefficients of these terms in the loss; 0 for what is only reported."""
        return {name: coef for kind in self.config.layers for name, coef in self._list_terms(kind).items()}

    def _list_terms(self, kind: LayerKind) -> dict[str, float]:
        return FEED_FORWARDS[type(kind.feed_forward)].list_terms(kind.feed_forward)


@lru_cache(maxsize=32)
def build_model(config: ModelConfig) -> Model:
    """Returns the model of `config`; nothing is allocated."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(config)))
    specs = nnx.to_pure_dict(nnx.get_partition_spec(state))
    abstract = nnx.to_pure_dict(state)
    axes = map_paths(lambda path, spec: tuple(spec), specs)
    return Model(config, graphdef, abstract, axes)


Index = tuple[slice, ...]


def init_params(model: Model, shardings: Tree, seed: int, dtype: DTypeLike = np.float32) -> Tree:
    """Returns random parameters: norms 1, biases and offsets 0, the rest normal with deviation 0.02; empty layers 0.

    Of an adapter, B is 0, and A uniform within 1 / sqrt(number of inputs), as PEFT has them.

    `shardings` may be of some of them alone. They are a copy of `dtype`, see `Model.copy_dtype`. Values depend on
    (seed, path, layer) only, never on the layout, and are drawn on the host a layer at a time: no compile.
    """

    shapes = flatten_paths(model.abstract)

    def one(path: str, sharding: Sharding) -> jax.Array:
        leaf = shapes[path]
        fill, own = make_fill(path, leaf.shape, seed), model.copy_dtype(path, dtype)

        def values(index: Index | None) -> np.ndarray:
            filled = fill(cast(Index, index)).astype(own)
            if path.startswith("layers/"):
                filled[np.arange(leaf.shape[0])[cast(Index, index)[0]] >= model.config.num_layers] = 0
            return filled

        return jax.make_array_from_callback(leaf.shape, sharding, values, dtype=own)

    return map_paths(one, shardings)


def make_fill(path: str, shape: tuple[int, ...], seed: int) -> Callable[[Index], np.ndarray]:
    """Returns `fill(index)`, the initial values of that slice of the parameter at `path`."""
    name = path.rsplit("/", 1)[-1]
    stacked = path.startswith("layers/")

    @cache
    def whole(layer: int) -> np.ndarray:
        rng = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(path.encode()) << 16 | layer]))
        own = shape[1:] if stacked else shape
        if name == "lora_a":
            bound = 1 / math.sqrt(math.prod(own[:-1]))
            return rng.uniform(-bound, bound, own).astype(np.float32)
        return rng.standard_normal(own, np.float32) * np.float32(0.02)

    def fill(index: Index) -> np.ndarray:
        dims = [len(range(*s.indices(n))) for s, n in zip(index, shape)]
        if name in ("scale", "scale_less_one", "bias", "offset", "lora_b"):
            return np.full(dims, float(name == "scale"), np.float32)
        if not stacked:
            return whole(0)[index]
        return np.stack([whole(layer)[index[1:]] for layer in range(*index[0].indices(shape[0]))])

    return fill
