"""realjax: RLHF training on JAX with parameter reallocation."""

__version__ = "0.1.0"
