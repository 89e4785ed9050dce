"""The experts that tokens were sent to, as the sampler records them and a later forward pass replays them.

A choice that lies close to another flips with the rounding of another program; what is learned from a token would then
go through experts that did not make it (arXiv:2510.11370).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array


@dataclass(frozen=True)
class Routes:
    """How the experts of one token in all layers are stored: W int32 words, each of 8 or 16 bits a choice.

    A choice is 1 + the expert's number; 0: it is not known, and the router's own holds.
    """

    num_layers: int  # that have experts
    per_token: int
    num_experts: int

    @property
    def width(self) -> int:
        """W."""
        return -(-self.num_layers * self.per_token // self._per_word)

    @property
    def _per_word(self) -> int:
        return 4 if self.num_experts < 2**8 else 2

    def pack(self, ids: Array) -> Array:
        """Returns the words `[..., W]` of experts' numbers `[..., L, k]`."""
        flat = ids.reshape(*ids.shape[:-2], -1).astype(jnp.uint32) + 1
        padding = self.width * self._per_word - flat.shape[-1]
        flat = jnp.pad(flat, [*[(0, 0)] * (flat.ndim - 1), (0, padding)])
        parts = flat.reshape(*flat.shape[:-1], self.width, self._per_word) << self._shifts
        return jax.lax.bitcast_convert_type(jnp.sum(parts, axis=-1, dtype=jnp.uint32), jnp.int32)

    def unpack(self, words: Array) -> Array:
        """Returns the choices `[..., L, k]` of words `[..., W]`, uint8 or uint16."""
        dtype, most = (jnp.uint8, 2**8 - 1) if self._per_word == 4 else (jnp.uint16, 2**16 - 1)
        parts = (jax.lax.bitcast_convert_type(words, jnp.uint32)[..., None] >> self._shifts) & most
        flat = parts.reshape(*words.shape[:-1], -1)[..., : self.num_layers * self.per_token]
        return flat.astype(dtype).reshape(*words.shape[:-1], self.num_layers, self.per_token)

    @property
    def _shifts(self) -> Array:
        return jnp.arange(self._per_word, dtype=jnp.uint32) * (32 // self._per_word)
