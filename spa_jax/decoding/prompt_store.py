"""A store of prompts that have run: a frozen backbone computes the same for them whatever plugin goes on from there.

Shape letters: G groups (prompts), U of them that are not the beginning of another one, T prompt tokens, P taps,
D width, S cache slots.
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
    """The backbone's outputs for a batch of prompts."""

    states: Float[Array, "B M D"]
    """The state at the entry of the last token of each prompt (B = G, M = 1), or of all tokens (B = U, M = T) where
    corrections enter at all of them."""
    taps: Float[Array, "P C N D"]
    """Taps of the last token of each prompt (C = G, N = 1), or of all tokens (C = U, N = T) where the side network
    reads all of them."""
    cache: Cache
    """The backbone's own keys and values of U prompts; where all tokens are corrected, those of the blocks before the
    entry, and zeros above it."""


class PromptStore:
    """Keeps `PromptState`s in host memory, for the next model on the same backbone that generates from these prompts.

    A batch of prompts is one entry. Beyond the limit the least recently used entries are dropped.
    """

    def __init__(self, limit_gib: float) -> None:
        """Creates an empty store.

        Args:
            limit_gib: most memory, in GiB.
        """
        self._limit, self._bytes = int(limit_gib * 2**30), 0
        self._entries: OrderedDict[Hashable, PromptState] = OrderedDict()
        self.hits = 0

    def get(self, key: Hashable, length: int, slots: int, compute: Callable[[], PromptState]) -> PromptState:
        """Returns the state with a cache of S slots, computed if it is not in the store.

        Args:
            key: identifies everything that decides what `compute` returns, but for S.
            length: T, the slots of the cache that hold prompts; the others are zero.
            slots: S.
            compute: runs the prompts.
        """
        if key in self._entries:
            self.hits += 1
            self._entries.move_to_end(key)
            return _with_slots(jax.tree.map(jnp.asarray, self._entries[key]), slots)
        state = compute()
        entry = jax.device_get(_with_slots(state, length))
        size = _nbytes(entry)
        while self._entries and self._bytes + size > self._limit:
            self._bytes -= _nbytes(self._entries.popitem(last=False)[1])
        if size <= self._limit:
            self._entries[key], self._bytes = entry, self._bytes + size
        return state


def _nbytes(state: PromptState) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


@functools.partial(jax.jit, static_argnums=1)
def _with_slots(state: PromptState, slots: int) -> PromptState:
    """Cuts the cache to so many slots, or fills it up with zeros."""

    def resized(leaf: jax.Array) -> jax.Array:
        leaf = leaf[..., :slots]
        return jnp.pad(leaf, [(0, 0)] * (leaf.ndim - 1) + [(0, slots - leaf.shape[-1])])

    return state._replace(cache=jax.tree.map(resized, state.cache))
