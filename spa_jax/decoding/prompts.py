"""Prompts that have run: a frozen backbone makes the same of them whatever plugin goes on from there.

Shape letters: G groups (prompts), U of them that begin no other one, T prompt tokens, P taps, D width, S slots.
"""

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spa_jax.models.block import Cache


class PromptState(NamedTuple):
    """What a backbone makes of prompts."""

    hidden: Float[Array, "G D"]
    """f after the last token of each."""
    taps: Float[Array, "P B M D"]
    """Of the last token of each (B = G, M = 1), or of all tokens (B = U, M = T) for a side network that attends."""
    cache: Cache
    """Of U prompts."""


class PromptStore:
    """Keeps what a backbone made of prompts in host memory, for the next model on it that generates from the same ones.

    A batch of prompts is kept as one; beyond the limit, those that were not asked for the longest go.
    """

    def __init__(self, limit_gib: float) -> None:
        """Args:
        limit_gib: most memory, in GiB."""
        self._limit, self._bytes = int(limit_gib * 2**30), 0
        self._kept: OrderedDict[Hashable, PromptState] = OrderedDict()
        self.hits = 0

    def get(self, key: Hashable, length: int, slots: int, run: Callable[[], PromptState]) -> PromptState:
        """The state with a cache of S slots.

        Args:
            key: whatever decides what `run` returns, but for S.
            length: T, the slots of the cache that hold prompts; the others are zero.
            slots: S.
            run: makes the state where it is not kept.
        """
        if key in self._kept:
            self.hits += 1
            self._kept.move_to_end(key)
            return _with_slots(jax.tree.map(jnp.asarray, self._kept[key]), slots)
        made = run()
        kept = jax.device_get(_with_slots(made, length))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(kept))
        while self._kept and self._bytes + size > self._limit:
            _, gone = self._kept.popitem(last=False)
            self._bytes -= sum(leaf.nbytes for leaf in jax.tree.leaves(gone))
        if size <= self._limit:
            self._kept[key], self._bytes = kept, self._bytes + size
        return made


@functools.partial(jax.jit, static_argnums=1)
def _with_slots(state: PromptState, slots: int) -> PromptState:
    """The cache cut or filled with zeros to so many slots."""

    def resized(leaf: jax.Array) -> jax.Array:
        leaf = leaf[..., :slots]
        return jnp.pad(leaf, [(0, 0)] * (leaf.ndim - 1) + [(0, slots - leaf.shape[-1])])

    return state._replace(cache=jax.tree.map(resized, state.cache))
