"""Reads `config.json` of a LLaMA, Mistral, Qwen2 or Qwen3.

Every key is used, known not to change the computation, or refused.
"""

import logging
from collections.abc import Mapping
from typing import Any, Literal, cast

import numpy as np

from spa_jax.errors import UserError
from spa_jax.models.block import LlamaConfig, RopeScaling

log = logging.getLogger(__name__)

IGNORED_KEYS = frozenset({
    # where it comes from and what software does with it
    "_name_or_path", "name_or_path", "transformers_version", "transformers.js_config", "is_llama_config", "torch_dtype",
    "dtype", "_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "_flash_attn_2_enabled",
    "use_cache", "cache_implementation", "return_dict", "return_dict_in_generate", "output_attentions",
    "output_hidden_states", "output_scores", "gradient_checkpointing", "torchscript", "chunk_size_feed_forward",
    "max_sequence_length", "unsloth_fixed", "unsloth_version", "base_model_tp_plan", "base_model_pp_plan",
    # training
    "initializer_range", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "dropout",
    # token ids: the embedding is the same, and the tokenizer knows them
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id",
    "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids",
    # classification heads, which a LlamaForCausalLM has not
    "id2label", "label2id", "problem_type", "task_specific_params", "finetuning_task",
    # sampling, which the user decides
    "max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
    "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_return_sequences", "remove_invalid_values",
    "exponential_decay_length_penalty", "prefix", "tokenizer_class",
    # sums the same products in slices
    "pretraining_tp",
})  # fmt: skip

_REQUIRED_VALUES = {
    "hidden_act": "silu",
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "is_encoder_decoder": False,
    "is_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False,
    "use_bfloat16": False,
    "pruned_heads": {},
    "quantization_config": None,
}

MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""`model_type` -> the class of transformers that computes what we do."""
_MISTRAL_WINDOW = 4096
"""The sliding window that transformers takes where a Mistral's config.json has no such key; null is none."""

_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_NO_DEFAULT = object()
_SMALLEST, _LARGEST = (float(bound) for bound in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))
MOST = 2**31 - 1
"""The largest size or number of positions, which are int32."""


def llama_config_from_hf(described: Mapping[str, Any]) -> LlamaConfig:
    """Reads the content of `config.json`, in the form of transformers 4 or 5.

    Args:
        described: the parsed file.

    Raises:
        UserError: a key (named in the message) is missing, unknown, contradicts another one, or is not supported.
    """
    keys = _Keys(described)
    kind = keys.get("model_type")
    if kind not in tuple(MODEL_TYPES):
        raise _unsupported("model_type", kind, ", ".join(MODEL_TYPES))
    for key, value in _REQUIRED_VALUES.items():
        keys.require(key, value)
    architectures = keys.get("architectures", [MODEL_TYPES[kind]])
    if not isinstance(architectures, list) or MODEL_TYPES[kind] not in architectures:
        raise _unsupported("architectures", architectures, MODEL_TYPES[kind])
    width, num_heads = keys.number("hidden_size"), keys.number("num_attention_heads")
    num_kv_heads = keys.number("num_key_value_heads", num_heads if kind == "llama" else _NO_DEFAULT)
    if num_heads % num_kv_heads:
        raise UserError(
            f"config.json: num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}."
        )
    head_dim = keys.number("head_dim", _NO_DEFAULT if kind == "qwen3" else width // num_heads)
    if head_dim % 2:
        raise UserError(f"config.json: head_dim {head_dim} is odd, so rotary pairs do not come out even.")
    theta, scaling = _rope(keys)
    config = LlamaConfig(
        vocab_size=keys.number("vocab_size"),
        hidden_size=width,
        intermediate_size=keys.number("intermediate_size"),
        num_layers=keys.number("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=keys.decimal("rms_norm_eps", 1e-6),
        tie_word_embeddings=keys.flag("tie_word_embeddings"),
        attention_bias=kind in ("llama", "qwen3") and keys.flag("attention_bias"),
        mlp_bias=kind == "llama" and keys.flag("mlp_bias"),
        max_position_embeddings=_context(keys, kind),
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
    )
    keys.finish()
    return config


def _context(keys: "_Keys", kind: str) -> int:
    """Returns the most positions that a sequence may have: where there is a sliding window, no more than it has, so
    that it hides nothing."""
    positions = keys.number("max_position_embeddings", 2048 if kind == "llama" else _NO_DEFAULT)
    if kind == "mistral":
        window = keys.get("sliding_window", None if keys.has("sliding_window") else _MISTRAL_WINDOW)
    elif kind in ("qwen2", "qwen3"):
        keys.get("max_window_layers", None)
        window, slides = keys.get("sliding_window", None), keys.flag("use_sliding_window")
        kinds = keys.get("layer_types", [])
        if not isinstance(kinds, list):
            raise _unsupported("layer_types", kinds, "a list of each block's kind of attention")
        slides |= "sliding_attention" in kinds
        window = window if slides else None
    else:
        window = None
    if window is None:
        return positions
    if not isinstance(window, int) or isinstance(window, bool) or window <= 0:
        raise _unsupported("sliding_window", window, "a positive whole number or null")
    if window < positions:
        log.info("the context is the sliding window's %d tokens, not the backbone's %d", window, positions)
    return min(positions, window)


def _rope(keys: "_Keys") -> tuple[float, RopeScaling | None]:
    """Reads base and rescaling from `rope_parameters` (transformers 5), `rope_theta` and `rope_scaling`, or both."""
    theta = keys.decimal("rope_theta", None)
    old, new = keys.get("rope_scaling", None), keys.get("rope_parameters", None)
    scaling = _rope_scaling("rope_scaling", old)
    if new is None:
        inside = _rope_theta("rope_scaling", old)
        if None not in (theta, inside) and theta != inside:
            raise _disagree("rope_theta", theta, "rope_scaling.rope_theta", inside)
        return float(theta or inside or 10000.0), scaling
    new_scaling = _rope_scaling("rope_parameters", new)
    new_theta = _rope_theta("rope_parameters", new)
    if None not in (theta, new_theta) and theta != new_theta:
        raise _disagree("rope_theta", theta, "rope_parameters.rope_theta", new_theta)
    if old is not None and scaling != new_scaling:
        raise _disagree("rope_scaling", old, "rope_parameters", new)
    return float(new_theta or theta or 10000.0), new_scaling


def _rope_scaling(key: str, described: Any) -> RopeScaling | None:
    if described is None:
        return None
    if not isinstance(described, Mapping):
        raise _unsupported(key, described, "an object")
    given = {name: value for name, value in described.items() if value is not None}
    kinds = [given.pop(name) for name in ("rope_type", "type") if name in given] or ["default"]
    kind = kinds[0]
    if kinds[-1] != kind:
        raise _disagree(f"{key}.rope_type", kind, f"{key}.type", kinds[-1])
    if kind not in tuple(_ROPE_KEYS):
        raise _unsupported(f"{key}.rope_type", kind, ", ".join(_ROPE_KEYS))
    if (share := given.pop("partial_rotary_factor", 1.0)) != 1.0:
        raise _unsupported(f"{key}.partial_rotary_factor", share, "1.0")
    given.pop("rope_theta", None)
    if kind != "llama3":
        given.pop("original_max_position_embeddings", None)  # they do not read it
    if missing := [name for name in _ROPE_KEYS[kind] if name not in given]:
        raise UserError(
            f"config.json: {key} of type {kind} lacks {', '.join(missing)}; add what the model's card says."
        )
    if unknown := sorted(set(given) - set(_ROPE_KEYS[kind])):
        raise UserError(
            f"config.json: spa_jax does not know {', '.join(f'{key}.{name}' for name in unknown)} of type {kind}."
        )
    for name in given:
        if not _is_positive(given[name]):
            raise _unsupported(f"{key}.{name}", given[name], "a positive number")
    if kind == "llama3" and given["low_freq_factor"] >= given["high_freq_factor"]:
        raise _unsupported(f"{key}.low_freq_factor", given["low_freq_factor"], "less than high_freq_factor")
    return None if kind == "default" else RopeScaling(cast(Literal["linear", "llama3"], kind), **given)


def _rope_theta(key: str, described: Mapping[str, Any] | None) -> float | None:
    theta = None if described is None else described.get("rope_theta")
    if theta is not None and not _is_positive(theta):
        raise _unsupported(f"{key}.rope_theta", theta, "a positive number")
    return theta


def _is_positive(value: Any) -> bool:
    """Tells whether the value is a number that float32, in which a backbone computes, holds and keeps above 0."""
    return type(value) in (int, float) and _SMALLEST <= value <= _LARGEST


def _disagree(first: str, first_value: Any, second: str, second_value: Any) -> UserError:
    return UserError(f"config.json: {first} {first_value} disagrees with {second} {second_value}; keep the right one.")


def _unsupported(key: str, value: Any, supported: str) -> UserError:
    return UserError(f"config.json: {key} = {value!r} is not supported, only {supported}; choose another model.")


class _Keys:
    """The keys of the file; `finish` refuses the keys that nothing read, so that none is silently ignored."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self._read: set[str] = set()

    def get(self, key: str, default: Any = _NO_DEFAULT) -> Any:
        self._read.add(key)
        value = self._values.get(key)
        if value is not None:
            return value
        if default is _NO_DEFAULT:
            raise UserError(f"config.json lacks {key}; add it, or fetch the checkpoint again.")
        return default

    def has(self, key: str) -> bool:
        """Tells whether the file has the key, be it with the value null."""
        return key in self._values

    def number(self, key: str, default: Any = _NO_DEFAULT) -> int:
        value = self.get(key, default)
        if type(value) is not int or not 0 < value <= MOST:
            raise _unsupported(key, value, f"a positive whole number up to {MOST}")
        return value

    def decimal(self, key: str, default: Any = _NO_DEFAULT) -> Any:
        value = self.get(key, default)
        if value is not default and not _is_positive(value):
            raise _unsupported(key, value, "a positive number")
        return value

    def flag(self, key: str) -> bool:
        value = self.get(key, False)
        if not isinstance(value, bool):
            raise _unsupported(key, value, "true or false")
        return value

    def require(self, key: str, expected: Any) -> None:
        if (value := self.get(key, expected)) != expected:
            raise _unsupported(key, value, repr(expected))

    def finish(self) -> None:
        unknown = {key for key, value in self._values.items() if value is not None} - self._read - IGNORED_KEYS
        if unknown:
            raise UserError(
                f"config.json: spa_jax does not know {', '.join(sorted(unknown))}; remove what does not change the "
                f"computation, or choose another model."
            )
