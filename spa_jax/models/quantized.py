"""How a frozen backbone's matrices are kept in memory: as they are, in 8 bits, or as the bits of half precision.

In 8 bits every matrix is int8, with one float32 scale for each of its output channels, by Qwix. A block's matrices
become floats again within the loop over the blocks, where XLA makes that a part of their products: no second copy of
the backbone is ever there. Norms and biases stay as they are. Shape letters as in `spa_jax.models.llama`, I and O for
the input and output width of any matrix.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from jaxtyping import Array, Float, Int

from spa_jax.errors import UserError

Matrix = Any
"""A `jax.Array` or a `qwix.QArray`."""

CHANNELS = {
    r"embed/embedding": (0,),  # V,D
    r"blocks/attention/[qkv]/kernel": (1, 2),  # D,N,H
    r"blocks/attention/o/kernel": (2,),  # N,H,D
    r"blocks/mlp/(gate|up|down)/kernel": (1,),  # I,O
    r"lm_head/kernel": (1,),  # D,V
}
"""Parameter path -> the axes of one block's matrix along which scales differ: all that a product does not sum over."""


def quantize(path: str, leaf: jax.Array) -> Matrix:
    """Quantises a parameter to round(w / scale), with scale = max |w| / 127.5 of each output channel.

    Parameters that are no matrix stay as they are. Stacked blocks are quantised one by one, which saves memory.
    """
    axes = next((axes for pattern, axes in CHANNELS.items() if re.fullmatch(pattern, path)), None)
    if axes is None:
        return leaf

    def one(matrix: jax.Array) -> qwix.QArray:
        return qwix.quantize(matrix.astype(jnp.float32), jnp.int8, channelwise_axes=axes)

    return jax.lax.map(one, leaf) if path.startswith("blocks/") else one(leaf)


def keep_as_bits(params: Any) -> Any:
    """Keeps the blocks' matrices in bfloat16 as integers of the same bits, for a CPU.

    XLA has no slices of bfloat16 there: to read one block it would turn all of them into float32 at every call.
    """

    def keep(path: Any, leaf: Matrix) -> Matrix:
        is_matrix = re.fullmatch(r"blocks/.*/kernel", "/".join(str(key.key) for key in path[:4]))
        return _to_bits(leaf) if is_matrix and leaf.dtype == jnp.bfloat16 else leaf

    return jax.tree_util.tree_map_with_path(keep, params, is_leaf=_is_quantized)


@functools.partial(jax.jit, donate_argnums=0)
def _to_bits(leaf: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(leaf, jnp.uint16)


def dequantize(tree: Any) -> Any:
    """Turns every matrix of a tree that is quantised, or kept as bits, into floats."""

    def floats(leaf: Matrix) -> jax.Array:
        if _is_quantized(leaf):
            return qwix.dequantize(leaf)
        return jax.lax.bitcast_convert_type(leaf, jnp.bfloat16) if leaf.dtype == jnp.uint16 else leaf

    return jax.tree.map(floats, tree, is_leaf=_is_quantized)


def take_embeddings(embedding: Matrix, tokens: Int[Array, "*M"]) -> Float[Array, "*M D"]:
    """Looks up the tokens' rows of an embedding `[V,D]`; no other rows become floats."""
    if isinstance(embedding, qwix.QArray):
        return embedding.qvalue[tokens].astype(jnp.float32) * embedding.scale[tokens]
    return embedding[tokens]


def need_floats(params: Any, what: str) -> None:
    """Refuses quantised parameters on behalf of `what`, which does not work on such.

    Raises:
        UserError: some parameter is quantised.
    """
    if any(map(_is_quantized, jax.tree.leaves(params, is_leaf=_is_quantized))):
        raise UserError(f"{what} needs a backbone whose weights are floats: leave weights at 'float'")


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, qwix.QArray)
