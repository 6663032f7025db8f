"""The key/value cache: a plain pytree, the batch first in every leaf."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from spa_jax.models.llama import Cache, LlamaConfig


def init_cache(config: LlamaConfig, batch: int, slots: int, dtype: jnp.dtype) -> Cache:
    """An empty cache `{"k", "v"}` of `[B,L,S,K,H]`; slot s of a row will hold the token at position s of that row."""
    shape = (batch, config.num_layers, slots, config.num_kv_heads, config.head_dim)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


def cache_bytes(config: LlamaConfig, batch: int, slots: int, dtype: jnp.dtype) -> int:
    """Memory that `init_cache` takes."""
    leaves = jax.tree.leaves(jax.eval_shape(lambda: init_cache(config, batch, slots, dtype)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


Caches = TypeVar("Caches")


def reorder(caches: Caches, rows: Int[Array, " R"]) -> Caches:
    """Each row replaced by the one it descends from; `rows` may also be more than there are."""
    return jax.tree.map(lambda leaf: leaf[rows], caches)
