"""What we know of an architecture: its config in both directions, and where our leaves lie in its checkpoints."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from realjax.core.json_text import JsonObject
from realjax.hf.dims import parse_dims
from realjax.models.config import ModelConfig

TABLE, HEAD, LAYERS = "embed/table", "head/kernel", "layers"


@dataclass(frozen=True)
class Rule:
    """Leaf `path` of ours is tensor `name` of the checkpoint; `dims` orders them, as "(N H) D -> D N H" (HF -> ours).

    With `{layer}` in the name there is one such tensor for each layer of a stack, whose leading dim `dims` leaves out;
    with `{expert}` one for each index of the first dim of ours, which their side then lacks. `hf/dims.py` says what
    else `dims` can be. Rules of one path are parts of that leaf, rules of one name parts of that tensor. A rule is used
    where the model has the leaf. Raises ValueError when it does not hold together.
    """

    path: str
    name: str
    dims: str

    def __post_init__(self) -> None:
        if self.stacked != self.path.startswith(f"{LAYERS}/"):
            raise ValueError(f"rule '{self.path}': '{self.name}' needs {{layer}} where the leaf is of a layer only")
        parse_dims(self.dims_of_one)

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.name

    @property
    def per_expert(self) -> bool:
        return "{expert}" in self.name

    @cached_property
    def dims_of_one(self) -> str:
        """`dims` of one expert."""
        theirs, ours = self.dims.split(" -> ")
        return f"{theirs} -> {ours.partition(' ')[2]}" if self.per_expert else self.dims


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture: its class names, its table, and its config in both directions."""

    name: str  # the `model_type` of its config.json
    published_as: tuple[str, ...]  # names of model series of this architecture
    causal_class: str
    critic_class: str
    rules: tuple[Rule, ...]
    config_from_hf: Callable[[JsonObject, bool], ModelConfig]  # (config.json, is_critic)
    config_to_hf: Callable[[ModelConfig], JsonObject]
    defaults: JsonObject = field(default_factory=dict)  # transformers' values of keys that a config.json may leave out
    # Classes, with both kinds of head, of models with a part for more than text: `text_config` describes the decoder.
    outer_classes: tuple[str, ...] = ()
    # Other beginnings of tensors' names, and those of the rules; None: of tensors that are no part of the decoder.
    spellings: Mapping[str, str | None] = field(default_factory=dict)

    # Checkpoints may hold layers behind the last one, which predict tokens further on.
    has_more_layers: bool = False

    def respell(self, name: str, num_layers: int) -> str | None:
        """Returns the rules' name of a checkpoint's tensor; None where it is no part of a decoder of so many layers."""
        if self.has_more_layers and (layer := re.match(r"model\.layers\.(\d+)\.", name)):
            return name if int(layer[1]) < num_layers else None
        for theirs, ours in self.spellings.items():
            if name.startswith(theirs):
                return None if ours is None else ours + name.removeprefix(theirs)
        return name

    def name_tensor(self, path: str) -> str:
        """Returns the name that the table gives to a leaf outside the layers."""
        return next(rule.name for rule in self.rules if rule.path == path)
