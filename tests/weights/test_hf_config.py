"""`config.json` is read completely, or refused by name."""

import re

import pytest

from spa_jax.errors import UserError
from spa_jax.models.block import RopeScaling
from spa_jax.weights.hf_config import llama_config_from_hf

BASE = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "vocab_size": 320,
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def test_defaults_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.LlamaConfig(**{key: value for key, value in BASE.items() if key != "model_type"})
    config = llama_config_from_hf(BASE)
    assert config.num_kv_heads == reference.num_key_value_heads
    assert config.head_dim == reference.head_dim
    assert config.rms_norm_eps == reference.rms_norm_eps
    assert config.rope_theta == reference.rope_parameters["rope_theta"]
    assert config.max_position_embeddings == reference.max_position_embeddings
    assert config.tie_word_embeddings == reference.tie_word_embeddings
    assert (config.attention_bias, config.mlp_bias) == (reference.attention_bias, reference.mlp_bias)
    assert config == llama_config_from_hf({**reference.to_dict(), "architectures": ["LlamaForCausalLM"]})


def test_every_field_is_read() -> None:
    config = llama_config_from_hf(
        {
            **BASE, "num_key_value_heads": 2, "head_dim": 24, "rms_norm_eps": 1e-4, "tie_word_embeddings": True,
            "attention_bias": True, "mlp_bias": True, "max_position_embeddings": 77, "rope_theta": 5e5,
            "rope_scaling": {"type": "linear", "factor": 2.0},
        }
    )  # fmt: skip
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (320, 64, 96)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (2, 4, 2, 24)
    assert (config.rms_norm_eps, config.max_position_embeddings, config.rope_theta) == (1e-4, 77, 5e5)
    assert (config.tie_word_embeddings, config.attention_bias, config.mlp_bias) == (True, True, True)
    assert config.rope_scaling == RopeScaling("linear", 2.0)


@pytest.mark.parametrize(
    ("rope", "theta", "scaling"),
    [
        ({}, 10000.0, None),
        ({"rope_theta": 1e5}, 1e5, None),
        ({"rope_theta": 1e5, "rope_scaling": None}, 1e5, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, 1e5, None),
        ({"rope_parameters": {"rope_theta": 1e5}}, 1e5, None),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 1e5}, 1e5, None),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, 10000.0, RopeScaling("linear", 4.0)),
        ({"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 4.0}}, 1e4, RopeScaling("linear", 4.0)),
        ({"rope_scaling": LLAMA3, "rope_theta": 5e5}, 5e5, RopeScaling("llama3", 32.0)),
        ({"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}, 5e5, RopeScaling("llama3", 32.0)),
        (
            {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}, "rope_scaling": LLAMA3, "rope_theta": 5e5},
            5e5,
            RopeScaling("llama3", 32.0),
        ),
    ],
)
def test_rope_in_both_forms(rope: dict, theta: float, scaling: RopeScaling | None) -> None:
    config = llama_config_from_hf({**BASE, **rope})
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e5}}, "rope_theta"),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 1e5}}, "rope_theta"),
        ({"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 2.0}}, "rope_scaling.type"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, "rope_parameters.factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}}, "beta_fast"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "gemma3"}, "model_type = 'gemma3'"),
        ({"model_type": "mistral"}, "MistralForCausalLM"),
        ({"model_type": None}, "model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"sliding_window": 128}, "sliding_window"),
        ({"logit_scale": 0.5, "embedding_multiplier": 2}, "embedding_multiplier, logit_scale"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"architectures": 7}, "architectures"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"rms_norm_eps": True}, "rms_norm_eps"),
        ({"rope_theta": "10000"}, "rope_theta"),
        ({"rope_parameters": {"rope_theta": "10000"}}, "rope_parameters.rope_theta"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_parameters.rope_theta"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": -1.0}}, "rope_scaling.rope_theta"),
        *(
            ({"rope_scaling": {"type": "linear", "factor": factor}}, "rope_scaling.factor")
            for factor in (0, -2.0, "8.0", True, [2.0], float("nan"), float("inf"))
        ),
        (
            {"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}},
            "low_freq_factor = 4.0 is not supported, only less than",
        ),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 0.0}}, "low_freq_factor"),
        ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": "8192"}}, "original_max_position_embeddings"),
        ({"rope_scaling": {"type": ["linear"], "factor": 2.0}}, "rope_scaling.rope_type = ['linear']"),
        ({"rope_scaling": {"rope_type": "linear", "type": ["linear"], "factor": 2.0}}, "disagrees"),
        ({"rope_parameters": {"rope_type": {}, "factor": 2.0}}, "rope_parameters.rope_type"),
        ({"vocab_size": 2**31}, "vocab_size"),
        ({"max_position_embeddings": 10**30}, "max_position_embeddings"),
        *(({"rope_theta": value}, "rope_theta") for value in (10**400, 1e39, 1e-39)),
        ({"rms_norm_eps": 1e300}, "rms_norm_eps"),
        ({"rope_parameters": {"rope_theta": 10**400}}, "rope_parameters.rope_theta"),
        ({"rope_scaling": {"type": "linear", "factor": 10**400}}, "rope_scaling.factor"),
    ],
)
def test_refused_by_name(change: dict, named: str) -> None:
    with pytest.raises(UserError, match=re.escape(named)):
        llama_config_from_hf({**BASE, **change})


@pytest.mark.parametrize(
    ("kind", "windows", "context"),
    [
        ("mistral", {}, 4096),
        ("mistral", {"sliding_window": None}, 32768),
        ("mistral", {"sliding_window": 100}, 100),
        ("mistral", {"sliding_window": 99_999}, 32768),
        ("qwen2", {"sliding_window": 100, "max_window_layers": 2, "use_sliding_window": False}, 32768),
        ("qwen2", {"sliding_window": 100, "max_window_layers": 2, "use_sliding_window": True}, 100),
        ("qwen3", {"layer_types": ["full_attention"] * 3, "use_sliding_window": False, "sliding_window": 100}, 32768),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 100}, 100),
    ],
)
def test_no_sequence_is_longer_than_a_sliding_window(
    kind: str, windows: dict, context: int, caplog: pytest.LogCaptureFixture
) -> None:
    classes = {"mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    described = {key: value for key, value in BASE.items() if key not in ("attention_bias", "mlp_bias")}
    described |= {"model_type": kind, "architectures": [classes[kind]], "max_position_embeddings": 32768}
    with caplog.at_level("INFO", "spa_jax"):
        config = llama_config_from_hf({**described, "num_key_value_heads": 2, "head_dim": 16, **windows})
    assert config.max_position_embeddings == context
    assert (f"sliding window's {context} tokens" in caplog.text) == (context < 32768)
    assert (config.qkv_bias, config.qk_norm) == (kind == "qwen2", kind == "qwen3")


@pytest.mark.parametrize("kinds", [7, True, "sliding_attention", {"0": "full_attention"}], ids=str)
def test_kinds_of_attention_that_are_no_list_are_refused(kinds) -> None:
    described = {**BASE, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "max_position_embeddings": 99}
    with pytest.raises(UserError, match=r"layer_types = .* is not supported, only a list"):
        llama_config_from_hf({**described, "num_key_value_heads": 2, "head_dim": 16, "layer_types": kinds})


@pytest.mark.parametrize("key", ["num_key_value_heads", "max_position_embeddings", "head_dim"])
def test_what_the_classes_of_transformers_differ_in_must_be_said(key: str) -> None:
    described = {**BASE, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "max_position_embeddings": 99}
    described = {**described, "num_key_value_heads": 2, "head_dim": 16, key: None}
    with pytest.raises(UserError, match=f"lacks {key}"):
        llama_config_from_hf(described)


def test_keys_of_published_checkpoints_that_change_nothing_are_ignored() -> None:
    published = {
        "_name_or_path": "x", "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 2,
        "initializer_range": 0.04, "is_llama_config": True, "pretraining_tp": 2, "rope_interleaved": False,
        "torch_dtype": "bfloat16", "transformers.js_config": {}, "transformers_version": "4.42.3", "use_cache": True,
        "max_sequence_length": 2048, "sliding_window": None,
    }  # fmt: skip
    assert llama_config_from_hf({**BASE, **published}) == llama_config_from_hf(BASE)
