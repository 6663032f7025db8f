"""Converts checkpoints to our parameters by one table of Hugging Face's tensor names, which is total or an error."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from spa_jax.choices import DTYPES
from spa_jax.errors import UserError
from spa_jax.models.block import LlamaConfig
from spa_jax.models.compute import Weights
from spa_jax.models.llama import Params, init_params
from spa_jax.models.quantized import Matrix, quantize

Shardings = Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None]
"""Sharding of a parameter by its slash-separated path and its shape; None for the default device."""

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
    "model.layers.{}.self_attn.q_norm.weight": ("blocks/attention/q_norm/scale", "H -> H"),
    "model.layers.{}.self_attn.k_norm.weight": ("blocks/attention/k_norm/scale", "H -> H"),
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
"""Hugging Face name -> (our path, layout in the checkpoint -> our layout).

`NH` is one dimension that joins both letters, the first one slower. `{}` is the block's number; our parameters stack
the blocks along a leading axis.
"""

IGNORED_TENSORS = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
"""Buffers of old checkpoints that follow from the config."""

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


@runtime_checkable
class TensorSource(Protocol):
    """A checkpoint's tensors by their Hugging Face names, in Hugging Face's layout."""

    def names(self) -> set[str]:
        """Returns the names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of one tensor, without reading it."""

    def read(self, name: str) -> Float[np.ndarray, "..."]:
        """Reads one tensor as float32, float16 or bfloat16, at best as a memory map, of which only a part may be used.
        Called once per tensor, from several threads."""


@dataclasses.dataclass(frozen=True)
class TensorLayout:
    """A row of `TABLE` with the sizes of one config.

    Attributes:
        shape: the tensor's shape in the checkpoint.
        split: the same with one dimension for each letter.
        order: the permutation of those dimensions that is our layout.
    """

    shape: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]

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
    source: TensorSource,
    dtype: jax.typing.DTypeLike = jnp.float32,
    shardings: Shardings | None = None,
    weights: Weights = "float",
) -> tuple[Params, str]:
    """Reads every tensor of a checkpoint once, one parameter (stacked over blocks) at a time.

    At any time, host memory holds the shards of one parameter that belong to this process's devices, and the tensors
    being read. Finished parameters are on the devices.

    Args:
        config: the architecture that the checkpoint must have.
        source: the checkpoint's tensors.
        dtype: dtype of the parameters, float32 or bfloat16.
        shardings: places the parameters on devices; without it they go to the default device.
        weights: `float` keeps matrices as they are; `int8` quantises them on the devices.

    Returns:
        The parameters, and the fingerprint of the architecture and the checkpoint's values.

    Raises:
        UserError: tensors (all named in the message) are missing, unknown or of another shape, one has values that are
            not finite, or the dtype is not one of `DTYPES`.
    """
    target = np.dtype(dtype)
    if target.name not in DTYPES:
        raise UserError(f"A backbone cannot be loaded as {target.name}; choose one of {', '.join(DTYPES)}.")
    leaves = _leaves(config)
    _check_tensors(config, source, leaves)
    digests: dict[str, str] = {}
    params = {}
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for path, (shape, names, layout) in leaves.items():
            stacked = path.startswith("blocks/")
            whole = (len(names), *shape) if stacked else shape
            shards = _LocalShards(whole, target, shardings(path, whole) if shardings else None)

            def fill(
                index: int, name: str, shards: Any = shards, layout: TensorLayout = layout, stacked: bool = stacked
            ) -> tuple[str, str]:
                tensor = source.read(name)
                if not shards.fill(layout.apply(tensor), index if stacked else None):
                    raise UserError(
                        f"{name} has values that are NaN or infinite as {target.name}, so the checkpoint is damaged; "
                        "fetch it again, or choose another model."
                    )
                if name == EMBEDDING and config.tie_word_embeddings and LM_HEAD in source.names():
                    _check_tied(tensor, source.read(LM_HEAD))
                return name, _digest(name, tensor)

            digests.update(pool.map(fill, range(len(names)), names))
            params[path] = shards.finish() if weights == "float" else _quantize(path, shards.finish(), shardings)
    return flax.traverse_util.unflatten_dict(params, sep="/"), _fingerprint(config, digests)


def _quantize(path: str, leaf: jax.Array, shardings: Shardings | None) -> Matrix:
    quantize_leaf = functools.partial(quantize, path)
    out_shardings = jax.tree.map(
        lambda part: shardings(path, part.shape) if shardings else None, jax.eval_shape(quantize_leaf, leaf)
    )
    return jax.block_until_ready(jax.jit(quantize_leaf, out_shardings=out_shardings)(leaf))


class _LocalShards:
    """The shards of one parameter that this process's devices hold, each once, by their bounds along every axis."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding | None) -> None:
        self._shape, self._sharding = shape, sharding
        indices: Iterable[Any] = [()]
        if sharding is not None:
            indices = sharding.addressable_devices_indices_map(shape).values()
        bounds = {self._bounds(index) for index in indices}
        self._shards = {shard: _aligned_empty(tuple(end - begin for begin, end in shard), dtype) for shard in bounds}

    def _bounds(self, index: tuple[slice, ...]) -> tuple[tuple[int, int], ...]:
        whole = index or (slice(None),) * len(self._shape)
        return tuple(axis.indices(size)[:2] for axis, size in zip(whole, self._shape))

    def fill(self, tensor: np.ndarray, block: int | None) -> bool:
        """Copies what the shards need from one block's tensor, or (block None) from the whole parameter; tells whether
        all of that is finite."""
        finite = True
        for bounds, shard in self._shards.items():
            index = tuple(slice(*axis) for axis in bounds)
            if block is None:
                shard[...] = tensor[index]
                finite &= _is_finite(shard)
            elif bounds[0][0] <= block < bounds[0][1]:
                shard[block - bounds[0][0]] = tensor[index[1:]]
                finite &= _is_finite(shard[block - bounds[0][0]])
        return finite

    def finish(self) -> jax.Array:
        """Puts the parameter on the devices."""
        if self._sharding is None:
            (whole,) = self._shards.values()
            return jax.device_put(whole)
        return jax.make_array_from_callback(
            self._shape, self._sharding, lambda index: self._shards[self._bounds(index or ())]
        )


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Like `np.empty`, on a 64-byte boundary, so that JAX's CPU backend takes the memory over and does not copy it."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def _is_finite(values: np.ndarray, chunk: int = 2**18) -> bool:
    """Looks at contiguous values a chunk at a time, which takes less memory and time than all at once."""
    flat = values.reshape(-1)
    return all(bool(np.isfinite(flat[begin : begin + chunk]).all()) for begin in range(0, flat.size, chunk))


@functools.cache
def _leaves(config: LlamaConfig) -> dict[str, tuple[tuple[int, ...], list[str], TensorLayout]]:
    """Returns for each parameter its shape without the block axis, its tensors in the checkpoint, and their layout."""
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


def _check_tensors(config: LlamaConfig, source: TensorSource, leaves: Mapping[str, tuple]) -> None:
    """Compares all names and shapes, before anything is read."""
    expected = {name: layout.shape for _, names, layout in leaves.values() for name in names}
    given = {name for name in source.names() if not IGNORED_TENSORS.search(name)}
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
    """Digests name, shape and evenly spread values; digesting all of them would take longer than reading the tensor."""
    count = min(samples, tensor.size)
    indices = np.arange(count, dtype=np.int64) * (tensor.size - 1) // max(count - 1, 1)
    values = tensor.reshape(-1)[indices].astype("<f4")
    return hashlib.sha256(f"{name}{list(tensor.shape)}".encode() + values.tobytes()).hexdigest()


def _fingerprint(config: LlamaConfig, digests: Mapping[str, str]) -> str:
    architecture = dataclasses.asdict(config)
    for name in ("qkv_bias", "qk_norm"):  # fingerprints of models without them are older than these fields
        if not architecture[name]:
            del architecture[name]
    described = json.dumps([architecture, sorted(digests.items())], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:32]
