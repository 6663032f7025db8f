"""The key/value cache: a plain pytree, the batch first in every leaf.

The K hypotheses of a group share one row of it. The prompt is there once, then follow K slots for every new position,
one for each hypothesis. A token keeps its slot whatever becomes of its hypothesis: a beam search moves no keys and
values, only which slots a hypothesis sees.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from spa_jax.data.pipeline import padded_length
from spa_jax.models.block import PADDING, Cache, CachePlacement, LlamaConfig


def init_cache(config: LlamaConfig, batch: int, slots: int, dtype: jnp.dtype) -> Cache:
    """An empty cache `{"k", "v"}` of `[B,L,K,H,S]`; `CachePlacement` say which slot holds which token."""
    shape = (batch, config.num_layers, config.num_kv_heads, config.head_dim, slots)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


def cache_bytes(config: LlamaConfig, batch: int, slots: int, dtype: jnp.dtype) -> int:
    """Memory that `init_cache` takes."""
    leaves = jax.tree.leaves(jax.eval_shape(lambda: init_cache(config, batch, slots, dtype)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def count_slots(longest: int, room: int, width: int) -> int:
    """Slots for a prompt of up to `longest` tokens and `room` new ones of each of `width` hypotheses."""
    return padded_length(longest + room * width, 64)


def see_prompt(lengths: Int[Array, " G"], width: int, slots: int) -> Bool[Array, "R S"]:
    """The slots that each of the R = G K hypotheses sees when it has no new token yet."""
    return jnp.repeat(jnp.arange(slots)[None, :] < lengths[:, None], width, axis=0)


def place_newest(
    seen: Bool[Array, "R S"], position: Int[Array, " G"], made: Int[Array, " G"], running: Bool[Array, " G"]
) -> tuple[CachePlacement, Bool[Array, "R S"]]:
    """Places `[G,K]` of the newest of `made` tokens, which stands at `position`, and what is seen with it in place.

    A group that is not running places nothing.
    """
    groups, width = len(made), len(seen) // len(made)
    first = position + (made - 1) * (width - 1)
    slots = jnp.where(running[:, None], first[:, None] + jnp.arange(width, dtype=jnp.int32)[None, :], PADDING)
    seen |= jnp.arange(seen.shape[1])[None, :] == slots.reshape(-1, 1)
    return CachePlacement(slots, seen.reshape(groups, 1, width, -1)), seen


Caches = TypeVar("Caches")


def reorder(caches: Caches, rows: Int[Array, " R"]) -> Caches:
    """Each row replaced by the one it descends from; `rows` may also be more than there are."""
    return jax.tree.map(lambda leaf: leaf[rows], caches)
