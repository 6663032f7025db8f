"""How a backbone's weights lie in memory: as the programs of an engine read them, which would else copy them first."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.layout import Format, Layout

from spa_jax.weights.backbone import Backbone

HEADS_FIRST = (0, 2, 1, 3)
"""Order in memory, slowest first, of the axes of `[L,D,N,H]`: each head's matrix lies together."""

Move = Callable[[Any, Format], Any]
"""Takes a parameter, and where and how it is to lie; returns it there."""


def move(leaf: jax.Array, where: Format) -> jax.Array:
    """Moves a parameter, which is gone where it was."""
    return jax.device_put(leaf, where, donate=True)


def lay_out(backbone: Backbone, move: Move = move) -> Backbone:
    """Moves a backbone's weights on a TPU into the layouts that an `Engine` reads.

    Of the weights as XLA puts them by default, every call would copy most into these first. For other devices they stay
    as they are.

    Args:
        backbone: nobody else may use its parameters any more. For programs that are only compiled these are their
            shapes and places.
        move: moves one parameter.
    """
    if backbone.partitioner.platform != "tpu":
        return backbone

    def moved(path: tuple[Any, ...], leaf: Any) -> Any:
        names = {getattr(key, "key", "") for key in path}
        of_heads = len(leaf.shape) == len(HEADS_FIRST) and not names.isdisjoint("qkv")
        order = HEADS_FIRST if of_heads else tuple(range(len(leaf.shape)))
        return move(leaf, Format(Layout(order), leaf.sharding))

    return dataclasses.replace(backbone, params=jax.tree_util.tree_map_with_path(moved, backbone.params))
