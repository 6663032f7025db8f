"""LLaMA, Mistral, Qwen2 and Qwen3 checkpoints in GGUF, llama.cpp's single-file format, quantised or not."""

import contextlib
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
from transformers import PreTrainedTokenizerFast

from spa_jax.chat import end_of_answer
from spa_jax.errors import UserError
from spa_jax.models.block import LlamaConfig, RopeScaling, rope_frequencies
from spa_jax.models.compute import Weights
from spa_jax.weights.backbone import Backbone, check_vocabulary
from spa_jax.weights.gguf_file import GGUFFile
from spa_jax.weights.gguf_tokenizer import eos_ids, tokenizer_from_metadata
from spa_jax.weights.hf_config import MOST
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
    "attn_q_norm": "model.layers.{}.self_attn.q_norm",
    "attn_k_norm": "model.layers.{}.self_attn.k_norm",
    "attn_output": "model.layers.{}.self_attn.o_proj",
    "ffn_norm": "model.layers.{}.post_attention_layernorm",
    "ffn_gate": "model.layers.{}.mlp.gate_proj",
    "ffn_up": "model.layers.{}.mlp.up_proj",
    "ffn_down": "model.layers.{}.mlp.down_proj",
}

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Values of `general.architecture`; a Mistral's is llama."""
_IGNORED_KEYS = ("rope.scaling.finetuned", "tensor_data_layout")
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
    eos = _stop_tokens(file, tokenizer)
    check_vocabulary(path, config, tokenizer, eos)
    kind = file.metadata["general.architecture"]
    log.info("%s: %s with %d blocks of width %d", path, kind, config.num_layers, config.hidden_size)
    source = GGUFSource(file, config)
    params, fingerprint = convert(config, source, dtype, shardings, weights) if read_weights else ({}, "")
    return Backbone(str(path), config, params, tokenizer, eos, fingerprint)


def _stop_tokens(file: GGUFFile, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Returns the ids that end a generation, ascending: those that the file names, and as in llama.cpp the one that
    ends an answer of its chat, which many files do not name."""
    named = set(eos_ids(file.metadata))
    if tokenizer.chat_template:
        with contextlib.suppress(UserError):  # whoever uses the template will hear of it
            end = end_of_answer(tokenizer, "chat")
            named |= set() if end is None else {end}
    return tuple(sorted(named))


class GGUFSource:
    """A `TensorSource` over a GGUF file: tensors are dequantised and put into Hugging Face's rotary order."""

    def __init__(self, file: GGUFFile, config: LlamaConfig) -> None:
        self._file = file
        self._stored = {_hf_name(name): name for name in file.shapes if name != ROPE_FREQS}
        paired = file.metadata["general.architecture"] == "llama"
        self._heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads} if paired else {}

    def names(self) -> set[str]:
        return set(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.shapes[self._stored[name]]

    def read(self, name: str) -> Float[np.ndarray, "..."]:
        tensor = self._file.dequantize(self._stored[name])
        projection = name.split(".")[-2]
        if projection not in self._heads:
            return tensor
        # GGUF stores the two rows of a LLaMA's rotary pair next to each other, Hugging Face half a head apart.
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
        UserError: the file is of another architecture, or a key (named in the message) is missing, unknown or not
            supported.
    """
    metadata = _Metadata(file.metadata, file.path)
    architecture = file.metadata["general.architecture"]
    if (parts := file.metadata.get("split.count", 1)) != 1:
        raise UserError(f"{file.path} is one of {parts} files (split.count); merge them by llama.cpp's gguf-split.")
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    width = metadata.number("embedding_length")
    num_heads = metadata.number("attention.head_count")
    head_dim = metadata.number("attention.key_length", width // max(num_heads, 1))
    metadata.require("attention.value_length", head_dim, head_dim)
    metadata.require("rope.dimension_count", head_dim, head_dim)
    metadata.require("expert_count", 0, 0)
    metadata.require("expert_used_count", 0, 0)
    metadata.require("attention.causal", True, True)
    theta = metadata.decimal("rope.freq_base", 10000.0)
    config = LlamaConfig(
        vocab_size=metadata.number("vocab_size", len(tokens) if isinstance(tokens, list) else 0),
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
        attention_bias=architecture != "qwen2" and _has(file, r"attn_\w+\.bias"),
        mlp_bias=_has(file, r"ffn_\w+\.bias"),
        max_position_embeddings=metadata.number("context_length"),
        qkv_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
    )
    metadata.finish()
    return _with_llama3_scaling(config, file) if ROPE_FREQS in file.shapes else config


def _has(file: GGUFFile, pattern: str) -> bool:
    """Tells whether blocks have a tensor of that name."""
    return any(re.fullmatch(rf"blk\.\d+\.{pattern}", name) for name in file.shapes)


def _linear_scaling(metadata: "_Metadata") -> RopeScaling | None:
    factor = metadata.decimal("rope.scale_linear", 1.0)  # before llama.cpp named the kinds
    kind = metadata.get("rope.scaling.type", "none" if factor == 1.0 else "linear")
    if kind not in ("none", "linear"):
        metadata.refuse("rope.scaling.type", kind, "none, linear or the llama3 kind (tensor rope_freqs.weight)")
    factor = metadata.decimal("rope.scaling.factor", factor)
    metadata.get("rope.scaling.original_context_length", None)  # these two kinds do not read it
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
    """The keys of a file that describe its architecture, such as `llama.block_count`, named without `llama.`; `finish`
    refuses those that nothing read, so that none is silently ignored."""

    def __init__(self, values: Mapping[str, Any], path: pathlib.Path) -> None:
        self._path = path
        architecture = values.get("general.architecture")
        if architecture not in ARCHITECTURES:
            raise self._unsupported("general.architecture", architecture, ", ".join(ARCHITECTURES))
        self._prefix = f"{architecture}."
        self._values = {key: value for key, value in values.items() if key.startswith(self._prefix)}
        self._read = {self._prefix + key for key in _IGNORED_KEYS}

    def get(self, key: str, default: Any = _NO_DEFAULT) -> Any:
        key = self._prefix + key
        self._read.add(key)
        value = self._values.get(key, default)
        if value is _NO_DEFAULT:
            raise UserError(f"{self._path} lacks the metadata key {key}; convert the model to GGUF again.")
        return value

    def number(self, key: str, default: Any = _NO_DEFAULT) -> int:
        value = self.get(key, default)
        if isinstance(value, list) and value == value[:1] * len(value) != []:  # one value per block
            value = value[0]
        if type(value) is not int or not 0 < value <= MOST:
            self.refuse(key, value, f"one positive whole number up to {MOST}")
        return value

    def decimal(self, key: str, default: Any = _NO_DEFAULT) -> float:
        value = self.get(key, default)
        if not isinstance(value, float) or not math.isfinite(value) or value <= 0:
            self.refuse(key, value, "one positive number")
        return _decimal(value)

    def require(self, key: str, expected: Any, default: Any = _NO_DEFAULT) -> None:
        value = self.get(key, default)
        if value != expected:
            self.refuse(key, value, repr(expected))

    def refuse(self, key: str, value: Any, supported: str) -> None:
        raise self._unsupported(self._prefix + key, value, supported)

    def _unsupported(self, key: str, value: Any, supported: str) -> UserError:
        return UserError(f"{self._path}: {key} = {value!r} is not supported, only {supported}; choose another model.")

    def finish(self) -> None:
        unknown = sorted(self._values.keys() - self._read)
        if unknown:
            raise UserError(f"{self._path}: spa_jax does not know {', '.join(unknown)}; choose another model.")
