"""The GGUF container: metadata and quantised tensors of one memory-mapped file.

The `gguf` package brings a reader as well; it makes several array views for every string, which takes 2.3 s for a
vocabulary of 49,152 tokens, more than all the rest of loading SmolLM2.
"""

import dataclasses
import math
import mmap
import pathlib
import struct
from typing import Any

import gguf
import numpy as np
from jaxtyping import Float

from spa_jax.errors import UserError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = gguf.GGUFValueType.STRING.value, gguf.GGUFValueType.ARRAY.value
_FORMATS = {
    gguf.GGUFValueType.UINT8: "B", gguf.GGUFValueType.INT8: "b", gguf.GGUFValueType.UINT16: "H",
    gguf.GGUFValueType.INT16: "h", gguf.GGUFValueType.UINT32: "I", gguf.GGUFValueType.INT32: "i",
    gguf.GGUFValueType.FLOAT32: "f", gguf.GGUFValueType.BOOL: "?", gguf.GGUFValueType.UINT64: "Q",
    gguf.GGUFValueType.INT64: "q", gguf.GGUFValueType.FLOAT64: "d",
}  # fmt: skip
_SCALARS = {kind.value: struct.Struct("<" + letter) for kind, letter in _FORMATS.items()}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: its logical shape, slowest dimension first, and its bytes."""

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    offset: int
    num_bytes: int


class GGUFFile:
    """An open GGUF file.

    Attributes:
        path: of the file.
        metadata: its keys and values; arrays as lists.
        tensors: by GGUF name.

    Raises:
        UserError: on opening, when the file is not GGUF, truncated, or of a version or tensor type not supported.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._position = 0
            self._read_header()
        except (OSError, ValueError, struct.error, IndexError, KeyError, OverflowError, MemoryError) as error:
            raise UserError(f"{path} is not a readable GGUF file ({error}); delete it and fetch it again.") from error

    def dequantize(self, name: str) -> Float[np.ndarray, "..."]:
        """One tensor as float32, or float16 where it is stored so."""
        tensor = self.tensors[name]
        raw = np.frombuffer(self._bytes, np.uint8, tensor.num_bytes, tensor.offset)
        if tensor.kind == gguf.GGMLQuantizationType.F16:
            return raw.view(np.float16).reshape(tensor.shape)
        rows = raw.reshape(*tensor.shape[:-1], -1)
        return gguf.quants.dequantize(rows, tensor.kind).reshape(tensor.shape)

    def _read_header(self) -> None:
        if self._take(4) != _MAGIC:
            raise ValueError("it does not start with GGUF")
        version = self._scalar(gguf.GGUFValueType.UINT32)
        if version not in _VERSIONS:
            raise ValueError(f"version {version}, supported are {_VERSIONS}, little-endian")
        tensor_count, key_count = (self._scalar(gguf.GGUFValueType.UINT64) for _ in range(2))
        self.metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self._string()
            self.metadata[key] = self._value(self._scalar(gguf.GGUFValueType.UINT32))
        described = [self._tensor() for _ in range(tensor_count)]
        alignment = self.metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        start = -(-self._position // alignment) * alignment
        self.tensors = {name: dataclasses.replace(tensor, offset=start + tensor.offset) for name, tensor in described}
        if len(self.tensors) != tensor_count:
            raise ValueError("two tensors have the same name")
        end = max((tensor.offset + tensor.num_bytes for tensor in self.tensors.values()), default=0)
        if end > len(self._bytes):
            raise ValueError(f"truncated: {len(self._bytes):,} bytes, its tensors end at {end:,}")

    def _take(self, count: int) -> bytes:
        end = self._position + count
        if end > len(self._bytes):
            raise ValueError("truncated inside the header")
        taken = self._bytes[self._position : end]
        self._position = end
        return taken

    def _scalar(self, kind: int) -> Any:
        layout = _SCALARS[kind]
        return layout.unpack(self._take(layout.size))[0]

    def _string(self) -> str:
        return self._take(self._scalar(gguf.GGUFValueType.UINT64)).decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(kind)
        item_kind = self._scalar(gguf.GGUFValueType.UINT32)
        count = self._scalar(gguf.GGUFValueType.UINT64)
        if item_kind in _SCALARS:
            layout = _SCALARS[item_kind]
            return [item for (item,) in layout.iter_unpack(self._take(count * layout.size))]
        return [self._value(item_kind) for _ in range(count)]

    def _tensor(self) -> tuple[str, StoredTensor]:
        name = self._string()
        rank = self._scalar(gguf.GGUFValueType.UINT32)
        shape = tuple(self._scalar(gguf.GGUFValueType.UINT64) for _ in range(rank))[::-1]
        kind = gguf.GGMLQuantizationType(self._scalar(gguf.GGUFValueType.UINT32))
        offset = self._scalar(gguf.GGUFValueType.UINT64)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if math.prod(shape[-1:]) % block:
            raise ValueError(f"rows of {name} are not a multiple of {block}")
        return name, StoredTensor(shape, kind, offset, math.prod(shape) // block * size)
