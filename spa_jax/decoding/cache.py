"""The key/value cache: a plain pytree, the batch first in every leaf.

The K hypotheses of a group share one row of it. The prompt is there once, then follow K slots for every new position,
one for each hypothesis. A token keeps its slot whatever becomes of its hypothesis: a beam search moves no keys and
values, only the mask of the slots that a hypothesis attends to.

Shape letters: G groups (prompts), K hypotheses of each, R = G K rows, S cache slots.
"""

import functools
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int

from spa_jax.data.padding import padded_length
from spa_jax.models.block import PADDING, Cache, CachePlacement, LlamaConfig
from spa_jax.models.partitioner import Partitioner


def init_cache(config: LlamaConfig, batch: int, slots: int, dtype: DTypeLike) -> Cache:
    """Creates an empty cache `{"k", "v"}` of `[B,L,K,H,S]`; a `CachePlacement` says which slot holds which token."""
    shape = (batch, config.num_layers, config.num_kv_heads, config.head_dim, slots)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def init_shared_cache(config: LlamaConfig, slots: int, dtype: DTypeLike, partitioner: Partitioner) -> Cache:
    """Creates an empty cache `{"k", "v"}` of `[L,S,K,H]`, whose slots all rows share."""
    shape = (config.num_layers, slots, config.num_kv_heads, config.head_dim)
    return {name: partitioner.constrain(jnp.zeros(shape, dtype), "LSKH") for name in ("k", "v")}


@functools.partial(jax.jit, static_argnums=(1, 2))
def grow_shared_cache(cache: Cache, slots: int, partitioner: Partitioner) -> Cache:
    """Adds empty slots to a shared cache."""

    def grown(leaf: jax.Array) -> jax.Array:
        padding = [(0, 0), (0, slots - leaf.shape[1]), (0, 0), (0, 0)]
        return partitioner.constrain(jnp.pad(leaf, padding), "LSKH")

    return jax.tree.map(grown, cache)


def cache_bytes(config: LlamaConfig, batch: int, slots: int, dtype: DTypeLike) -> int:
    """Computes the memory that `init_cache` takes."""
    leaves = jax.tree.leaves(jax.eval_shape(lambda: init_cache(config, batch, slots, dtype)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def count_slots(longest: int, max_new_tokens: int, width: int) -> int:
    """Computes S for prompts of up to `longest` tokens, and `max_new_tokens` of each of `width` hypotheses."""
    return padded_length(longest + max_new_tokens * width, 64)


@functools.partial(jax.jit, static_argnums=(1, 2))
def prompt_slot_mask(lengths: Int[Array, " G"], width: int, slots: int) -> Bool[Array, "R S"]:
    """Marks the slots that each of the R = G K hypotheses attends to when it has no new token yet."""
    return jnp.repeat(jnp.arange(slots)[None, :] < lengths[:, None], width, axis=0)


def place_newest(
    slot_mask: Bool[Array, "R S"],
    position: Int[Array, " G"],
    num_generated: Int[Array, " G"],
    active: Bool[Array, " G"],
) -> tuple[CachePlacement, Bool[Array, "R S"]]:
    """Places the newest token of each hypothesis in the cache.

    Args:
        slot_mask: slots that each hypothesis attended to before.
        position: where the newest tokens stand.
        num_generated: new tokens of each group, the newest included.
        active: groups whose newest tokens are run; the others place nothing.

    Returns:
        Placement of the tokens `[G,K]`, and the mask with their slots in it.
    """
    groups, width = len(num_generated), len(slot_mask) // len(num_generated)
    first = position + (num_generated - 1) * (width - 1)
    slots = jnp.where(active[:, None], first[:, None] + jnp.arange(width, dtype=jnp.int32)[None, :], PADDING)
    slot_mask |= jnp.arange(slot_mask.shape[1])[None, :] == slots.reshape(-1, 1)
    return CachePlacement(slots, slot_mask.reshape(groups, 1, width, -1)), slot_mask


Tree = TypeVar("Tree")


def take_rows(tree: Tree, rows: Int[Array, " N"]) -> Tree:
    """Indexes the first axis of every leaf, to reorder its rows, to repeat or to drop some."""
    return jax.tree.map(lambda leaf: leaf[rows], tree)
