"""One table of Hugging Face tensor names to our parameters, and the conversion that follows it completely or stops."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from spa_jax.errors import UserError
from spa_jax.models.compute import Weights
from spa_jax.models.llama import LlamaConfig, Params, init_params
from spa_jax.models.quantized import Matrix, quantize

Shardings = Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None]
"""Where a parameter lies, named by its slash-separated path and its shape; None for the default device."""

DTYPES = ("float32", "bfloat16")

TABLE = {
    "model.embed_tokens.weight": ("embed/embedding", "V,D -> V,D"),
    "model.layers.{}.input_layernorm.weight": ("blocks/attention_norm/scale", "D -> D"),
    "model.layers.{}.self_attn.q_proj.weight": ("blocks/attention/q/kernel", "NH,D -> D,N,H"),
    "model.layers.{}.self_attn.k_proj.weight": ("blocks/attention/k/kernel", "KH,D -> D,K,H"),
    "model.layers.{}.self_attn.v_proj.weight": ("blocks/attention/v/kernel", "KH,D -> D,K,H"),
    "model.layers.{}.self_attn.o_proj.weight": ("blocks/attention/o/kernel", "D,NH -> N,H,D"),
    "model.layers.{}.self_attn.q_proj.bias": ("blocks/attention/q/bias", "NH -> N,H"),
    "model.layers.{}.self_attn.k_proj.bias": ("blocks/attention/k/bias", "KH -> K,H"),
    "model.layers.{}.self_attn.v_proj.bias": ("blocks/attention/v/bias", "KH -> K,H"),
    "model.layers.{}.self_attn.o_proj.bias": ("blocks/attention/o/bias", "D -> D"),
    "model.layers.{}.post_attention_layernorm.weight": ("blocks/mlp_norm/scale", "D -> D"),
    "model.layers.{}.mlp.gate_proj.weight": ("blocks/mlp/gate/kernel", "F,D -> D,F"),
    "model.layers.{}.mlp.up_proj.weight": ("blocks/mlp/up/kernel", "F,D -> D,F"),
    "model.layers.{}.mlp.down_proj.weight": ("blocks/mlp/down/kernel", "D,F -> F,D"),
    "model.layers.{}.mlp.gate_proj.bias": ("blocks/mlp/gate/bias", "F -> F"),
    "model.layers.{}.mlp.up_proj.bias": ("blocks/mlp/up/bias", "F -> F"),
    "model.layers.{}.mlp.down_proj.bias": ("blocks/mlp/down/bias", "D -> D"),
    "model.norm.weight": ("norm/scale", "D -> D"),
    "lm_head.weight": ("lm_head/kernel", "V,D -> D,V"),
}
"""Hugging Face name -> (our path, layout there -> layout here).

`NH` is a dimension that holds both letters, the first one slower. `{}` is the block, which here is the leading axis
of one stacked parameter.
"""

HARMLESS = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
"""Buffers that old checkpoints carry, and that the config determines."""

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Source(Protocol):
    """Where tensors come from, under their Hugging Face names and in their Hugging Face layout."""

    def names(self) -> set[str]:
        """All tensors there are."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it."""

    def read(self, name: str) -> Float[np.ndarray, "..."]:
        """One tensor as float32, float16 or bfloat16, of which a memory map brings only what is used; called once per
        tensor and from several threads."""


@dataclasses.dataclass(frozen=True)
class TensorLayout:
    """A row of `TABLE` with the numbers of one config filled in."""

    shape: tuple[int, ...]  # in the checkpoint
    split: tuple[int, ...]  # one letter per dimension
    order: tuple[int, ...]  # of those letters in our layout

    @classmethod
    def parse(cls, layout: str, sizes: Mapping[str, int]) -> "TensorLayout":
        source, target = (side.strip().split(",") for side in layout.split("->"))
        letters = "".join(source)
        return cls(
            shape=tuple(math.prod(sizes[letter] for letter in group) for group in source),
            split=tuple(sizes[letter] for letter in letters),
            order=tuple(letters.index(letter) for letter in target),
        )

    def apply(self, tensor: np.ndarray) -> np.ndarray:
        return tensor.reshape(self.split).transpose(self.order)


def convert(
    config: LlamaConfig,
    source: Source,
    dtype: jax.typing.DTypeLike = jnp.float32,
    shardings: Shardings | None = None,
    weights: Weights = "float",
) -> tuple[Params, str]:
    """Reads every tensor of a checkpoint once, one parameter at a time.

    Of one parameter, stacked over blocks, host memory holds what this process's devices will, and of a tensor of the
    checkpoint what the source brings; the devices hold the rest.

    Args:
        config: the architecture the checkpoint must have.
        source: its tensors.
        dtype: of the parameters, float32 or bfloat16.
        shardings: where the parameters lie; without it they go to the default device.
        weights: whether matrices stay floats; otherwise the devices quantise them, one parameter after the other.

    Returns:
        The parameters and the fingerprint of architecture and source values.

    Raises:
        UserError: when a tensor is missing, unknown, or of another shape, with the names of all of them, or when the
            dtype is not one of `DTYPES`.
    """
    target = np.dtype(dtype)
    if target.name not in DTYPES:
        raise UserError(f"A backbone cannot be loaded as {target.name}; choose one of {', '.join(DTYPES)}.")
    leaves = _leaves(config)
    _check(config, source, leaves)
    digests: dict[str, str] = {}
    params = {}
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for path, (shape, names, layout) in leaves.items():
            stacked = path.startswith("blocks/")
            whole = (len(names), *shape) if stacked else shape
            parts = _Parts(whole, target, shardings(path, whole) if shardings else None)

            def fill(
                index: int, name: str, parts: _Parts = parts, layout: TensorLayout = layout, stacked: bool = stacked
            ) -> tuple[str, str]:
                tensor = source.read(name)
                parts.fill(layout.apply(tensor), index if stacked else None)
                if name == EMBEDDING and config.tie_word_embeddings and LM_HEAD in source.names():
                    _check_tied(tensor, source.read(LM_HEAD))
                return name, _digest(name, tensor)

            digests.update(pool.map(fill, range(len(names)), names))
            params[path] = parts.finish() if weights == "float" else _quantized(path, parts.finish(), shardings)
    return flax.traverse_util.unflatten_dict(params, sep="/"), _fingerprint(config, digests)


def _quantized(path: str, leaf: jax.Array, shardings: Shardings | None) -> Matrix:
    how = functools.partial(quantize, path)
    lies = jax.tree.map(lambda part: shardings(path, part.shape) if shardings else None, jax.eval_shape(how, leaf))
    return jax.block_until_ready(jax.jit(how, out_shardings=lies)(leaf))


class _Parts:
    """A parameter on its way from the checkpoint to the devices: the parts that those of this process hold, each once,
    by where they begin and end."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding | None) -> None:
        self._shape, self._sharding = shape, sharding
        here: Iterable[Any] = [()]
        if sharding is not None:
            here = sharding.addressable_devices_indices_map(shape).values()
        bounds = {self._bounds(index) for index in here}
        self._parts = {part: _empty(tuple(end - begin for begin, end in part), dtype) for part in bounds}

    def _bounds(self, index: tuple[slice, ...]) -> tuple[tuple[int, int], ...]:
        whole = index or (slice(None),) * len(self._shape)
        return tuple(axis.indices(size)[:2] for axis, size in zip(whole, self._shape))

    def fill(self, tensor: np.ndarray, block: int | None) -> None:
        """Takes what is needed of one block's tensor, or of the whole parameter."""
        for bounds, part in self._parts.items():
            index = tuple(slice(*axis) for axis in bounds)
            if block is None:
                part[...] = tensor[index]
            elif bounds[0][0] <= block < bounds[0][1]:
                part[block - bounds[0][0]] = tensor[index[1:]]

    def finish(self) -> jax.Array:
        if self._sharding is None:
            (whole,) = self._parts.values()
            return jax.device_put(whole)
        return jax.make_array_from_callback(
            self._shape, self._sharding, lambda index: self._parts[self._bounds(index or ())]
        )


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Like `np.empty`, on a 64-byte boundary: the CPU backend then takes the memory over, where it would copy it."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def _leaves(config: LlamaConfig) -> dict[str, tuple[tuple[int, ...], list[str], TensorLayout]]:
    """Per parameter of this config: its shape without the block dimension, its source tensors, and their layout."""
    c = config
    sizes = {
        "V": c.vocab_size, "D": c.hidden_size, "F": c.intermediate_size,
        "N": c.num_heads, "K": c.num_kv_heads, "H": c.head_dim,
    }  # fmt: skip
    abstract = flax.traverse_util.flatten_dict(init_params(config, abstract=True), sep="/")
    rows = {path: (name, TensorLayout.parse(layout, sizes)) for name, (path, layout) in TABLE.items()}
    leaves = {}
    for path, leaf in abstract.items():
        name, layout = rows[path]
        stacked = "{}" in name
        names = [name.format(layer) for layer in range(c.num_layers)] if stacked else [name]
        leaves[path] = (leaf.shape[1:] if stacked else leaf.shape, names, layout)
    return leaves


def _check(config: LlamaConfig, source: Source, leaves: Mapping[str, tuple]) -> None:
    """Compares all names and shapes before anything is read."""
    expected = {name: layout.shape for _, names, layout in leaves.values() for name in names}
    given = {name for name in source.names() if not HARMLESS.search(name)}
    allowed = set(expected) | ({LM_HEAD} if config.tie_word_embeddings else set())
    wrong = {name: shape for name, shape in expected.items() if name in given and tuple(source.shape(name)) != shape}
    problems = []
    if missing := sorted(set(expected) - given):
        problems.append(f"missing: {', '.join(missing)}")
    if extra := sorted(given - allowed):
        problems.append(f"unknown: {', '.join(extra)}")
    if wrong:
        listed = (f"{name} has {list(source.shape(name))}, expected {list(shape)}" for name, shape in wrong.items())
        problems.append(f"wrong shape: {'; '.join(listed)}")
    if problems:
        raise UserError(
            f"The checkpoint's tensors do not match its config; mend the one or the other. {'. '.join(problems)}."
        )


def _check_tied(embedding: np.ndarray, lm_head: np.ndarray) -> None:
    if not np.array_equal(embedding, lm_head):
        raise UserError(
            f"The config says tie_word_embeddings, but {LM_HEAD} differs from {EMBEDDING}; set tie_word_embeddings to "
            f"false, or delete {LM_HEAD} from the checkpoint."
        )


def _digest(name: str, tensor: np.ndarray, samples: int = 1024) -> str:
    """Digest of name, shape and evenly spread values; the whole tensor would cost more than reading it."""
    count = min(samples, tensor.size)
    indices = np.arange(count, dtype=np.int64) * (tensor.size - 1) // max(count - 1, 1)
    values = tensor.reshape(-1)[indices].astype("<f4")
    return hashlib.sha256(f"{name}{list(tensor.shape)}".encode() + values.tobytes()).hexdigest()


def _fingerprint(config: LlamaConfig, digests: Mapping[str, str]) -> str:
    described = json.dumps([dataclasses.asdict(config), sorted(digests.items())], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:32]
