"""Arrays on the wire: codecs, and their bytes in the messages of messages.proto.

Shape letters: M positions of a message, P taps, D width.
"""

from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from google.protobuf.message import DecodeError, Message
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from spa_jax.choices import CODECS, REPLIES, Codec, ReplyMode
from spa_jax.errors import UserError
from spa_jax.models.llama import Entry
from spa_jax.split.messages_pb2 import Tensor

Parsed = TypeVar("Parsed", bound=Message)

VERSION = 7
"""The version of the protocol; either side refuses another one by name."""

CHUNK_POSITIONS = 64
"""Most positions of a prompt in one message."""

DTYPES = {
    "float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16), "int8": np.dtype(np.int8),
}  # fmt: skip
LARGEST_FLOAT16 = float(np.finfo(np.float16).max)


class WireError(UserError):
    """A message does not follow the protocol; nothing in it is used."""


class Encoded(NamedTuple):
    """Vectors encoded by a codec."""

    values: Array | np.ndarray
    """`[..., D]` in the codec's dtype."""
    scales: Float[Array | np.ndarray, "..."] | None
    """float32, one for each vector; `int8` only."""


def encode(codec: Codec, x: Any) -> Encoded:
    """Encodes vectors `[...,D]`, in NumPy what is NumPy's: `int8` rounds to the 255 steps between minus and plus the
    largest magnitude of each vector, and `float16` clips at 65504."""
    xp: Any = np if isinstance(x, np.ndarray) else jnp
    if codec == "float16":
        x = xp.clip(x, -LARGEST_FLOAT16, LARGEST_FLOAT16)
    if codec != "int8":
        return Encoded(x.astype(DTYPES[codec]), None)
    x = x.astype(xp.float32)
    scales = xp.max(xp.abs(x), axis=-1) / xp.float32(127)
    steps = x / xp.where(scales > 0, scales, xp.float32(1))[..., None]
    return Encoded(xp.round(steps).astype(xp.int8), scales)


def decode(encoded: Encoded, dtype: DTypeLike) -> Any:
    """Restores `[...,D]` of what `encode` was given, as nearly as the codec can."""
    x = encoded.values.astype(dtype if encoded.scales is None else jnp.float32)
    return x if encoded.scales is None else (x * encoded.scales[..., None]).astype(dtype)


def pack(encoded: Encoded) -> Tensor:
    """Puts arrays on the host into a message."""
    scales = b"" if encoded.scales is None else np.asarray(encoded.scales, "<f4").tobytes()
    return Tensor(values=np.ascontiguousarray(np.asarray(encoded.values)).tobytes(), scales=scales)


def unpack(codec: Codec, tensor: Tensor, shape: tuple[int, ...]) -> Encoded:
    """Reads NumPy arrays `[*shape]` from a message.

    Raises:
        WireError: the bytes are not of that many numbers, or not all of them are finite.
    """
    dtype = DTYPES[codec]
    expected = int(np.prod(shape)) * dtype.itemsize
    expected_scales = int(np.prod(shape[:-1])) * 4 if codec == "int8" else 0
    if len(tensor.values) != expected or len(tensor.scales) != expected_scales:
        raise WireError(
            f"an array of {len(tensor.values)} bytes and {len(tensor.scales)} of scales came where {codec} of shape "
            f"{shape} has {expected} and {expected_scales}"
        )
    values = np.frombuffer(tensor.values, dtype).reshape(shape)
    scales = np.frombuffer(tensor.scales, "<f4").reshape(shape[:-1]) if codec == "int8" else None
    encoded = Encoded(cast(Array, values), cast(Array, scales))
    if not is_finite(encoded):
        raise WireError("an array came with numbers that are not finite")
    return encoded


def is_finite(encoded: Encoded) -> bool:
    """Tells whether all numbers of arrays on the host are finite when they are decoded."""
    values, scales = encoded
    floats = values if scales is None else 127 * np.asarray(scales, np.float64)
    with np.errstate(over="ignore"):
        return bool(np.isfinite(np.asarray(floats).astype(np.float32)).all())


def check_codec(codec: str) -> Codec:
    """Returns the name of a codec.

    Raises:
        UserError: there is no such codec.
    """
    if codec not in CODECS:
        raise UserError(f"codec '{codec}' is unknown; choices are {', '.join(CODECS)}")
    return codec


def check_reply(reply: str, search: bool, entry: Entry) -> ReplyMode:
    """Returns the name of a reply mode.

    Raises:
        UserError: there is no such mode, or it is `token` in a beam search or where corrections enter in front of a
            block.
    """
    if reply not in REPLIES:
        raise UserError(f"reply mode '{reply}' is unknown; choices are {', '.join(REPLIES)}")
    if search and reply == "token":
        raise UserError(
            "beam search compares all hypotheses of a prompt, which needs g in one place: reply mode 'token' can only "
            "be greedy or sample; use 'correction' with beams"
        )
    if entry != "head" and reply == "token":
        raise UserError(
            f"this plugin's corrections enter in front of block {entry}, and the blocks from there on are the cloud's, "
            "so the device cannot choose tokens: use reply mode 'correction' (--reply=correction)"
        )
    return reply


def parse(kind: type[Parsed], data: bytes) -> Parsed:
    """Parses a message.

    Raises:
        WireError: the bytes are no such message.
    """
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise WireError(f"{len(data)} bytes came that are no {kind.DESCRIPTOR.name}") from error


def bytes_per_position(codec: Codec, vectors: int, width: int) -> int:
    """Counts the bytes of one position's arrays, P taps down or one g up, without the rest of the message."""
    return vectors * (width * DTYPES[codec].itemsize + (4 if codec == "int8" else 0))


def to_host(encoded: Encoded) -> Encoded:
    """Fetches the arrays to the host."""
    return cast(Encoded, jax.device_get(encoded))
