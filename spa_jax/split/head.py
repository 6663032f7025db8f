"""The device's own copy of the frozen LM head, for reply mode `token`: it adds f and g, and says which token it chose.

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
from spa_jax.models.quantized import need_floats
from spa_jax.split import wire
from spa_jax.split.wire import Codec, Encoded
from spa_jax.weights.backbone import Backbone

Head = Encoded
"""`[V,D]` as a codec has it: full precision, or int8 with a scale a token."""

BLOCK = 2048
"""Rows of an int8 head that are decoded at once."""


def head_of(backbone: Backbone, codec: Codec | None = None) -> Head:
    """The backbone's LM head, in a codec or as it is."""
    need_floats(backbone.params, "a copy of the LM head")
    params = backbone.params
    tied = backbone.config.tie_word_embeddings
    kernel = params["embed"]["embedding"] if tied else params["lm_head"]["kernel"].T
    return Encoded(kernel, None) if codec is None else wire.encode(codec, kernel)


def logits(head: Head, x: Float[Array, "R D"]) -> Float[Array, "R V"]:
    """float32. An int8 head is decoded block by block, so that no whole one in float32 is ever there."""
    values, scales = head
    if scales is None:
        return (x.astype(values.dtype) @ values.T).astype(jnp.float32)
    blocks = -(-values.shape[0] // BLOCK)
    starts = jnp.minimum(BLOCK * jnp.arange(blocks), values.shape[0] - min(BLOCK, values.shape[0]))

    def write(index: jax.Array, done: jax.Array) -> jax.Array:
        start = starts[index]
        block = jax.lax.dynamic_slice_in_dim(values, start, min(BLOCK, values.shape[0]))
        return jax.lax.dynamic_update_slice_in_dim(done, x.astype(jnp.float32) @ block.astype(jnp.float32).T, start, 1)

    return jax.lax.fori_loop(0, blocks, write, jnp.zeros((x.shape[0], values.shape[0]))) * scales[None, :]


def save_head(path: Path, backbone: Backbone, codec: Codec) -> None:
    """Writes the head as safetensors, with the backbone's fingerprint.

    Raises:
        UserError: the place cannot be written.
    """
    head = wire.to_host(head_of(backbone, codec))
    arrays = {"values": np.ascontiguousarray(head.values)}
    if head.scales is not None:
        arrays["scales"] = np.asarray(head.scales)
    write_bytes(path, safetensors.numpy.save(arrays, {"fingerprint": backbone.fingerprint}))


def load_head(path: Path, fingerprint: str, hidden_size: int) -> Head:
    """Reads a head of the backbone with that fingerprint.

    Raises:
        UserError: no head there, a damaged one, or another backbone's.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            found = (file.metadata() or {}).get("fingerprint")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot read the LM head '{path}': {error}") from error
    values, scales = arrays.get("values", np.zeros(0)), arrays.get("scales")
    whole = values.ndim == 2 and values.shape[1] == hidden_size
    if not whole or (values.dtype == np.int8) != (scales is not None and scales.shape == values.shape[:1]):
        raise UserError(f"'{path}' holds no LM head for this plugin: make one with python -m spa_jax.serve head")
    if found != fingerprint:
        raise UserError(
            f"'{path}' is the LM head of a backbone with fingerprint {found}, and the plugin was trained on one with "
            f"{fingerprint}: make one of that backbone with python -m spa_jax.serve head"
        )
    return Encoded(jnp.asarray(values), None if scales is None else jnp.asarray(scales))
