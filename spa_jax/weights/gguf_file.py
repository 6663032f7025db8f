"""The GGUF container, as the `gguf` package reads it: metadata and quantised tensors of one memory-mapped file."""

import pathlib
from typing import Any

import gguf
import numpy as np
from jaxtyping import Float

from spa_jax.errors import UserError


class GGUFFile:
    """An open GGUF file.

    Attributes:
        path: the file's path.
        metadata: the file's keys and values; arrays as lists.
        shapes: shapes of the tensors by GGUF name, slowest dimension first.

    Raises:
        UserError: on opening, if the file is not GGUF, truncated, or of an unsupported version or unknown tensor type.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        try:
            reader = _Reader(path)
            self.metadata: dict[str, Any] = {key: field.contents() for key, field in reader.fields.items()}
        except (OSError, ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
            raise UserError(f"{path} is not a readable GGUF file ({error}); delete it and fetch it again.") from error
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.shapes = {name: tuple(map(int, reversed(tensor.shape))) for name, tensor in self._tensors.items()}

    def dequantize(self, name: str) -> Float[np.ndarray, "..."]:
        """Reads one tensor as float32, or as float16 if it is stored so.

        Raises:
            UserError: its type is none that weights are stored in.
        """
        tensor = self._tensors[name]
        if tensor.tensor_type == gguf.GGMLQuantizationType.F16:
            return tensor.data
        if tensor.tensor_type == gguf.GGMLQuantizationType.F64:
            return tensor.data.astype(np.float32)
        try:
            return gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(self.shapes[name])
        except NotImplementedError as error:
            raise UserError(
                f"{self.path}: the tensor {name} is of type {tensor.tensor_type.name}, which holds no weights that can "
                "be read; convert the model to another type, such as Q8_0 or F16."
            ) from error


class _Reader(gguf.GGUFReader):
    """Reads three times as fast: a slice of a plain array costs less than one of a memory map, and metadata has one for
    every word of the vocabulary."""

    @property  # type: ignore[misc]
    def data(self) -> np.ndarray:
        return self._mapped

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
        self._mapped = mapped.view(np.ndarray)
