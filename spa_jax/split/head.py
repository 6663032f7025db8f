"""The device's own copy of the frozen LM head, with which it chooses tokens itself in reply mode `token`.

Shape letters: R rows, V vocabulary, D width.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Array, Float

from spa_jax.errors import UserError
from spa_jax.files import write_bytes
from spa_jax.models.product import product
from spa_jax.models.quantized import need_floats
from spa_jax.split import wire
from spa_jax.split.wire import Codec, Encoded
from spa_jax.weights.backbone import Backbone

Head = Encoded
"""`[V,D]`, encoded by a codec: `int8` has one scale for each token."""

BLOCK = 2048
"""Rows of an int8 head that are decoded at a time."""


def head_of(backbone: Backbone, codec: Codec | None = None) -> Head:
    """Copies the backbone's LM head, in the backbone's dtype or encoded by a codec.

    Raises:
        UserError: the backbone's weights are kept in 8 bits.
    """
    need_floats(backbone.params, "a copy of the LM head")
    params = backbone.params
    tied = backbone.config.tie_word_embeddings
    kernel = params["embed"]["embedding"] if tied else params["lm_head"]["kernel"].T
    return Encoded(kernel, None) if codec is None else wire.encode(codec, kernel)


def logits(head: Head, x: Float[Array, "R D"]) -> Float[Array, "R V"]:
    """Applies the head, float32 out. An int8 head is decoded block by block, so that it is never whole in float32."""
    values, scales = head
    if scales is None:
        return product(x.astype(values.dtype), jnp.asarray(values), transposed=True, out=jnp.float32)
    blocks = -(-values.shape[0] // BLOCK)
    starts = jnp.minimum(BLOCK * jnp.arange(blocks), values.shape[0] - min(BLOCK, values.shape[0]))

    def write(index: jax.Array, done: jax.Array) -> jax.Array:
        start = starts[index]
        block = jax.lax.dynamic_slice_in_dim(values, start, min(BLOCK, values.shape[0]))
        return jax.lax.dynamic_update_slice_in_dim(done, x.astype(jnp.float32) @ block.astype(jnp.float32).T, start, 1)

    return jax.lax.fori_loop(0, blocks, write, jnp.zeros((x.shape[0], values.shape[0]))) * scales[None, :]


def save_head(path: Path, backbone: Backbone, codec: Codec) -> None:
    """Writes the backbone's head as safetensors, with its fingerprint.

    Raises:
        UserError: the file cannot be written.
    """
    head = wire.to_host(head_of(backbone, codec))
    arrays = {"values": np.ascontiguousarray(head.values)}
    if head.scales is not None:
        arrays["scales"] = np.asarray(head.scales)
    write_bytes(path, safetensors.numpy.save(arrays, {"fingerprint": backbone.fingerprint}))


def load_head(path: Path, fingerprint: str, hidden_size: int) -> Head:
    """Reads the head of the backbone with that fingerprint and width.

    Raises:
        UserError: the file is missing, damaged, of another backbone, or has values that are not finite.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            found = (file.metadata() or {}).get("fingerprint")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot read the LM head '{path}': {error}") from error
    values, scales = arrays.get("values", np.zeros(0)), arrays.get("scales")
    fits = values.ndim == 2 and values.shape[1] == hidden_size
    if not fits or (values.dtype == np.int8) != (scales is not None and scales.shape == values.shape[:1]):
        raise UserError(f"'{path}' holds no LM head for this plugin: make one with python -m spa_jax.serve head")
    if found != fingerprint:
        raise UserError(
            f"'{path}' is the LM head of a backbone with fingerprint {found}, and the plugin was trained on one with "
            f"{fingerprint}: make one of that backbone with python -m spa_jax.serve head"
        )
    if wrong := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
        raise UserError(f"'{path}' is damaged: {', '.join(wrong)} of the LM head are not all finite; make it again")
    return Encoded(jnp.asarray(values), None if scales is None else jnp.asarray(scales))
