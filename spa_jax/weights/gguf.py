"""LLaMA checkpoints in GGUF, llama.cpp's single-file format, quantised or not."""

import dataclasses
import logging
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from spa_jax.errors import UserError
from spa_jax.models.block import LlamaConfig, RopeScaling, rope_frequencies
from spa_jax.models.compute import Weights
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.gguf_file import GGUFFile
from spa_jax.weights.gguf_tokenizer import eos_ids, tokenizer_from_metadata
from spa_jax.weights.mapping import Shardings, convert

log = logging.getLogger(__name__)

ROPE_FREQS = "rope_freqs.weight"
"""Tensor of the numbers by which llama3 rescaling divides the rotary frequencies, its only trace in a GGUF file."""

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "model.layers.{}.input_layernorm",
    "attn_q": "model.layers.{}.self_attn.q_proj",
    "attn_k": "model.layers.{}.self_attn.k_proj",
    "attn_v": "model.layers.{}.self_attn.v_proj",
    "attn_output": "model.layers.{}.self_attn.o_proj",
    "ffn_norm": "model.layers.{}.post_attention_layernorm",
    "ffn_gate": "model.layers.{}.mlp.gate_proj",
    "ffn_up": "model.layers.{}.mlp.up_proj",
    "ffn_down": "model.layers.{}.mlp.down_proj",
}

_IGNORED_KEYS = {"llama.rope.scaling.finetuned", "llama.tensor_data_layout"}
_NO_DEFAULT = object()


def load_gguf(
    path: str | pathlib.Path,
    dtype: jax.typing.DTypeLike = jnp.float32,
    shardings: Shardings | None = None,
    weights: Weights = "float",
    read_weights: bool = True,
) -> Backbone:
    """Loads weights, config and tokenizer from one GGUF file.

    Args:
        path: path of the file.
        dtype: dtype of the parameters, float32 or bfloat16.
        shardings, weights: see `mapping.convert`.
        read_weights: whether they are read; else the backbone has no parameters and no fingerprint.

    Raises:
        UserError: the file is corrupt or truncated, or needs something that is not supported.
    """
    path = pathlib.Path(path)
    file = GGUFFile(path)
    config = llama_config_from_gguf(file)
    tokenizer = tokenizer_from_metadata(file.metadata, path)
    log.info("%s: LLaMA with %d blocks of width %d", path, config.num_layers, config.hidden_size)
    source = GGUFSource(file, config)
    params, fingerprint = convert(config, source, dtype, shardings, weights) if read_weights else ({}, "")
    return Backbone(str(path), config, params, tokenizer, eos_ids(file.metadata), fingerprint)


class GGUFSource:
    """A `TensorSource` over a GGUF file: tensors are dequantised and put into Hugging Face's rotary order."""

    def __init__(self, file: GGUFFile, config: LlamaConfig) -> None:
        self._file = file
        self._stored = {_hf_name(name): name for name in file.shapes if name != ROPE_FREQS}
        self._heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}

    def names(self) -> set[str]:
        return set(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.shapes[self._stored[name]]

    def read(self, name: str) -> Float[np.ndarray, "..."]:
        tensor = self._file.dequantize(self._stored[name])
        projection = name.split(".")[-2]
        if projection not in self._heads:
            return tensor
        # GGUF stores the two rows of a rotary pair next to each other, Hugging Face half a head apart.
        pairs = tensor.reshape(self._heads[projection], -1, 2, *tensor.shape[1:])
        return pairs.swapaxes(1, 2).reshape(tensor.shape)


def _hf_name(name: str) -> str:
    """Returns the Hugging Face name of a GGUF tensor; an unknown one keeps its name, which `convert` refuses."""
    match = re.fullmatch(r"(?:blk\.(?P<layer>\d+)\.)?(?P<module>\w+)\.(?P<kind>weight|bias)", name)
    if match is None or match["module"] not in _NAMES:
        return name
    module = _NAMES[match["module"]]
    if (match["layer"] is not None) != ("{}" in module):
        return name
    return f"{module.format(match['layer'])}.{match['kind']}"


def llama_config_from_gguf(file: GGUFFile) -> LlamaConfig:
    """Reads the architecture that a GGUF file describes.

    Raises:
        UserError: the file is no LLaMA's, or a key (named in the message) is missing, unknown or not supported.
    """
    metadata = _Metadata(file.metadata, file.path)
    metadata.require("general.architecture", "llama")
    metadata.require("split.count", 1, 1)
    width = metadata.number("embedding_length")
    num_heads = metadata.number("attention.head_count")
    head_dim = metadata.number("attention.key_length", width // max(num_heads, 1))
    metadata.require("llama.attention.value_length", head_dim, head_dim)
    metadata.require("llama.rope.dimension_count", head_dim, head_dim)
    metadata.require("llama.expert_count", 0, 0)
    metadata.require("llama.expert_used_count", 0, 0)
    metadata.require("llama.attention.causal", True, True)
    theta = metadata.decimal("rope.freq_base", 10000.0)
    config = LlamaConfig(
        vocab_size=metadata.number("vocab_size", len(file.metadata.get("tokenizer.ggml.tokens", ()))),
        hidden_size=width,
        intermediate_size=metadata.number("feed_forward_length"),
        num_layers=metadata.number("block_count"),
        num_heads=num_heads,
        num_kv_heads=metadata.number("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=_linear_scaling(metadata),
        rms_norm_eps=metadata.decimal("attention.layer_norm_rms_epsilon"),
        tie_word_embeddings="output.weight" not in file.shapes,
        attention_bias=any(re.fullmatch(r"blk\.\d+\.attn_\w+\.bias", name) for name in file.shapes),
        mlp_bias=any(re.fullmatch(r"blk\.\d+\.ffn_\w+\.bias", name) for name in file.shapes),
        max_position_embeddings=metadata.number("context_length"),
    )
    metadata.finish()
    return _with_llama3_scaling(config, file) if ROPE_FREQS in file.shapes else config


def _linear_scaling(metadata: "_Metadata") -> RopeScaling | None:
    factor = metadata.decimal("rope.scale_linear", 1.0)  # before llama.cpp named the kinds
    kind = metadata.get("llama.rope.scaling.type", "none" if factor == 1.0 else "linear")
    if kind not in ("none", "linear"):
        metadata.refuse("llama.rope.scaling.type", kind, "none, linear or the llama3 kind (tensor rope_freqs.weight)")
    factor = metadata.decimal("rope.scaling.factor", factor)
    metadata.get("llama.rope.scaling.original_context_length", None)  # these two kinds do not read it
    return RopeScaling("linear", factor) if kind == "linear" and factor != 1.0 else None


def _with_llama3_scaling(config: LlamaConfig, file: GGUFFile) -> LlamaConfig:
    """Recovers the rescaling from the divisors it led to.

    The file does not tell the original context length nor the frequency bounds, so the ones of every published LLaMA 3
    are tried, and what they give is compared with the divisors. The largest divisor is the factor itself.
    """
    divisors = file.dequantize(ROPE_FREQS).astype(np.float32)
    if np.all(divisors == 1.0):
        return config
    candidate = dataclasses.replace(config, rope_scaling=RopeScaling("llama3", _decimal(float(divisors.max()))))
    plain = dataclasses.replace(config, rope_scaling=None)
    expected = np.asarray(rope_frequencies(plain) / rope_frequencies(candidate))
    if config.rope_scaling or divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
        raise UserError(
            f"{file.path}: {ROPE_FREQS} is not the llama3 rotary rescaling that spa_jax knows (low_freq_factor 1, "
            f"high_freq_factor 4, 8192 original positions); load the Hugging Face checkpoint of this model instead."
        )
    return candidate


def _decimal(value: float) -> float:
    """Returns the shortest decimal with this float32: 1e-05, where the file's float32 reads 9.999999747e-06."""
    return float(str(np.float32(value)))


class _Metadata:
    """The `llama.*` keys of a file; `finish` refuses the keys that nothing read, so that none is silently ignored."""

    def __init__(self, values: Mapping[str, Any], path: pathlib.Path) -> None:
        self._values, self._path = values, path
        self._read = set(_IGNORED_KEYS)

    def get(self, key: str, default: Any = _NO_DEFAULT) -> Any:
        self._read.add(key)
        value = self._values.get(key, default)
        if value is _NO_DEFAULT:
            raise UserError(f"{self._path} lacks the metadata key {key}; convert the model to GGUF again.")
        return value

    def number(self, key: str, default: Any = _NO_DEFAULT) -> int:
        value = self.get(f"llama.{key}", default)
        if isinstance(value, list) and len(set(value)) == 1:  # one value per block
            value = value[0]
        if not isinstance(value, int) or value <= 0:
            self.refuse(f"llama.{key}", value, "one positive whole number")
        return value

    def decimal(self, key: str, default: Any = _NO_DEFAULT) -> float:
        value = self.get(f"llama.{key}", default)
        if not isinstance(value, float) or not math.isfinite(value) or value <= 0:
            self.refuse(f"llama.{key}", value, "one positive number")
        return _decimal(value)

    def require(self, key: str, expected: Any, default: Any = _NO_DEFAULT) -> None:
        value = self.get(key, default)
        if value != expected:
            self.refuse(key, value, repr(expected))

    def refuse(self, key: str, value: Any, supported: str) -> None:
        raise UserError(f"{self._path}: {key} = {value!r} is not supported, only {supported}; choose another model.")

    def finish(self) -> None:
        unknown = sorted(key for key in self._values if key.startswith("llama.") and key not in self._read)
        if unknown:
            raise UserError(f"{self._path}: spa_jax does not know {', '.join(unknown)}; choose another model.")
