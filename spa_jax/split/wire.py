"""Arrays on the wire: codecs, and their bytes in the messages of messages.proto.

Shape letters: M positions of a message, P taps, D width.
"""

from typing import Literal, NamedTuple, TypeVar, cast, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from google.protobuf.message import DecodeError, Message
from jaxtyping import Array, Float

from spa_jax.errors import UserError
from spa_jax.split.messages_pb2 import Tensor

Parsed = TypeVar("Parsed", bound=Message)

VERSION = 3
"""Of the protocol; either side refuses another one by name."""

Codec = Literal["float32", "bfloat16", "float16", "int8"]
CODECS: tuple[Codec, ...] = get_args(Codec)
ReplyMode = Literal["correction", "token"]
REPLIES: tuple[ReplyMode, ...] = get_args(ReplyMode)
"""What a device answers with: g, as in the paper, or the id of the token that it chose itself."""
DTYPES = {
    "float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16), "int8": np.dtype(np.int8),
}  # fmt: skip
LARGEST_FLOAT16 = float(np.finfo(np.float16).max)


class WireError(UserError):
    """A message that is not what the protocol says: nothing in it is used."""


class Encoded(NamedTuple):
    """Vectors as a codec has them."""

    values: Array
    """`[..., D]` in the codec's dtype."""
    scales: Float[Array, "..."] | None
    """float32, one a vector; of `int8` only."""


def encode(codec: Codec, x: Float[Array, "... D"]) -> Encoded:
    """`int8` rounds to the 255 steps between minus and plus the largest magnitude of each vector; `float16` clips at
    65504."""
    if codec == "float16":
        x = jnp.clip(x, -LARGEST_FLOAT16, LARGEST_FLOAT16)
    if codec != "int8":
        return Encoded(x.astype(DTYPES[codec]), None)
    x = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(x), axis=-1) / 127
    steps = x / jnp.where(scales > 0, scales, 1)[..., None]
    return Encoded(jnp.round(steps).astype(jnp.int8), scales)


def decode(encoded: Encoded, dtype: jnp.dtype) -> Float[Array, "... D"]:
    """What `encode` was given, as nearly as the codec has it."""
    x = encoded.values.astype(dtype if encoded.scales is None else jnp.float32)
    return x if encoded.scales is None else (x * encoded.scales[..., None]).astype(dtype)


def pack(encoded: Encoded) -> Tensor:
    """The bytes of fetched arrays."""
    scales = b"" if encoded.scales is None else np.asarray(encoded.scales, "<f4").tobytes()
    return Tensor(values=np.ascontiguousarray(np.asarray(encoded.values)).tobytes(), scales=scales)


def unpack(codec: Codec, tensor: Tensor, shape: tuple[int, ...]) -> Encoded:
    """NumPy arrays `[*shape]` of a message.

    Raises:
        WireError: the bytes are not of that many numbers, or not all of them are finite.
    """
    dtype = DTYPES[codec]
    want = int(np.prod(shape)) * dtype.itemsize
    want_scales = int(np.prod(shape[:-1])) * 4 if codec == "int8" else 0
    if len(tensor.values) != want or len(tensor.scales) != want_scales:
        raise WireError(
            f"an array of {len(tensor.values)} bytes and {len(tensor.scales)} of scales came where {codec} of shape "
            f"{shape} has {want} and {want_scales}"
        )
    values = np.frombuffer(tensor.values, dtype).reshape(shape)
    scales = np.frombuffer(tensor.scales, "<f4").reshape(shape[:-1]) if codec == "int8" else None
    floats = 127 * scales.astype(np.float64) if scales is not None else values
    with np.errstate(over="ignore"):
        finite = np.isfinite(floats.astype(np.float32)).all()
    if not finite:
        raise WireError("an array came with numbers that are not finite")
    return Encoded(cast(Array, values), cast(Array, scales))


def check_codec(codec: str) -> Codec:
    """Raises:
    UserError: no such codec."""
    if codec not in CODECS:
        raise UserError(f"codec '{codec}' is unknown; choices are {', '.join(CODECS)}")
    return codec


def check_reply(reply: str, search: bool) -> ReplyMode:
    """Raises:
    UserError: no such mode, or `token` in beam search."""
    if reply not in REPLIES:
        raise UserError(f"reply mode '{reply}' is unknown; choices are {', '.join(REPLIES)}")
    if search and reply == "token":
        raise UserError(
            "beam search compares all hypotheses of a prompt, which needs g in one place: reply mode 'token' can only "
            "be greedy or sample; use 'correction' with beams"
        )
    return reply


def parse(kind: type[Parsed], data: bytes) -> Parsed:
    """A message from its bytes.

    Raises:
        WireError: they are none.
    """
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise WireError(f"{len(data)} bytes came that are no {kind.DESCRIPTOR.name}") from error


def bytes_per_position(codec: Codec, vectors: int, width: int) -> int:
    """Bytes of the arrays of one position: P taps down, or one g up; the envelope is apart."""
    return vectors * (width * DTYPES[codec].itemsize + (4 if codec == "int8" else 0))


def to_host(encoded: Encoded) -> Encoded:
    """The arrays fetched."""
    return cast(Encoded, jax.device_get(encoded))
