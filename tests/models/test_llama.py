"""The backbone against transformers' PyTorch LLaMA, and the cached forward against the uncached one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spa_jax.decoding.cache import init_cache
from spa_jax.models.block import PADDING, LlamaConfig, positions_from_mask, rope_frequencies
from spa_jax.models.compute import Compute
from spa_jax.models.llama import Llama, init_params, normalize_taps
from spa_jax.weights.hf_config import llama_config_from_hf
from spa_jax.weights.mapping import convert
from tests.models.platforms import OtherPlatform

BASE = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "rms_norm_eps": 1e-5,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
VARIANTS = {
    "one key/value head, theta, tied": (
        17,
        {
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
        },
    ),
    "two key/value heads, past 256": (300, {}),
    "a key/value head per head, head_dim, eps": (17, {"num_key_value_heads": 4, "head_dim": 12, "rms_norm_eps": 0.05}),
    "linear scaling, attention bias": (80, {"rope_parameters": LINEAR, "attention_bias": True}),
    "llama3 scaling, mlp bias, tied": (130, {"rope_parameters": LLAMA3, "mlp_bias": True, "tie_word_embeddings": True}),
}
"""Sequence length and what differs from `BASE`."""


class StateDict:
    """A `spa_jax.weights.mapping.TensorSource` over a PyTorch module in memory."""

    def __init__(self, model) -> None:
        self.tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}

    def names(self):
        return set(self.tensors)

    def shape(self, name):
        return self.tensors[name].shape

    def read(self, name):
        return self.tensors[name]


def transformers_llama(**overrides):
    """A random `LlamaForCausalLM`, norm weights away from 1 and biases from 0, or no test would see them."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**BASE, **overrides})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def transformers_forward(model, tokens):
    """Logits, final hidden, raw h_0 ... h_L, and the output of each block's attention norm, the final norm's last."""
    import torch

    blocks, normed = [], []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, out: blocks.append(out if torch.is_tensor(out) else out[0]))
        layer.input_layernorm.register_forward_hook(lambda _, __, out: normed.append(out))
    with torch.no_grad():
        ids = torch.from_numpy(tokens).long()
        taps = [model.model.embed_tokens(ids)]
        out = model(ids, output_hidden_states=True)
    taps += blocks
    normed.append(out.hidden_states[-1])
    return [
        np.stack([tensor.numpy() for tensor in group])
        for group in ([out.logits], [out.hidden_states[-1]], taps, normed)
    ]


def positions_of(length, rows):
    """Positions 0, 1, ... of rows without padding."""
    return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (rows, length))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_hidden_and_every_tap_agree_with_transformers(variant):
    length, settings = VARIANTS[variant]
    torch_model = transformers_llama(**settings)
    config = llama_config_from_hf(torch_model.config.to_dict())
    params, _ = convert(config, StateDict(torch_model))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, length)).astype(np.int32)
    (logits,), (hidden,), taps, normed = transformers_forward(torch_model, tokens)

    all_taps = tuple(range(config.num_layers + 1))
    model = Llama(config, all_taps)

    @jax.jit
    def forward(params, tokens):
        out = model.apply({"params": params}, tokens, positions_of(length, 2))
        normalized = normalize_taps(params, config, all_taps, out.taps)
        return model.apply({"params": params}, out.hidden, method="logits"), out.hidden, out.taps, normalized

    assert np.abs(logits).max() > 1
    for ours, theirs in zip(forward(params, tokens), (logits, hidden, taps, normed)):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    np.testing.assert_allclose(rope_frequencies(config), torch_model.model.rotary_emb.inv_freq.numpy(), rtol=1e-6)


@pytest.mark.parametrize(("scaling", "length"), [(LINEAR, 80), (LLAMA3, 130)], ids=["linear", "llama3"])
def test_scaling_turns_several_pairs_by_radians_at_the_length_compared(scaling, length):
    config = llama_config_from_hf({**BASE, "model_type": "llama", "hidden_act": "silu", "rope_parameters": scaling})
    unscaled = rope_frequencies(dataclasses.replace(config, rope_scaling=None))
    assert (np.abs(rope_frequencies(config) - unscaled) * length > 1).sum() >= 2


TOKENS = np.random.default_rng(1).integers(0, 97, (3, 24)).astype(np.int32)
SLOTS = 32
TAPS = (0, 2, 3)


@pytest.fixture(scope="module")
def run(tiny_config, tiny_params):
    """The forward with taps (0, 2, 3), compiled once per shape."""
    model = Llama(tiny_config, TAPS)
    forward = jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs))
    return functools.partial(forward, tiny_params)


@pytest.fixture(scope="module")
def uncached(run):
    return run(TOKENS, positions_of(24, 3))


def cache_of(config, garbage=0.0):
    cache = init_cache(config, 3, SLOTS, jnp.float32)
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: jnp.asarray(np.float32(garbage * rng.standard_normal(leaf.shape))), cache)


def run_in_pieces(run, cache, sizes):
    """Hidden states and taps of `TOKENS` fed in pieces of these sizes."""
    hidden, taps, start = [], [], 0
    for size in sizes:
        piece = slice(start, start + size)
        out = run(TOKENS[:, piece], positions_of(24, 3)[:, piece], cache)
        hidden.append(out.hidden)
        taps.append(out.taps)
        cache, start = out.cache, start + size
    return np.concatenate(hidden, axis=1), np.concatenate(taps, axis=2)


@pytest.mark.parametrize(
    "sizes",
    [[1] * 24, [12, 12], [12, *[1] * 12]],
    ids=["token by token", "chunks", "prefill, then decode"],
)
@pytest.mark.parametrize("garbage", [0.0, 1e4], ids=["clean", "stale"])
def test_cached_agrees_with_uncached_in_a_cache_with_slots_to_spare(run, uncached, tiny_config, sizes, garbage):
    hidden, taps = run_in_pieces(run, cache_of(tiny_config, garbage), sizes)
    np.testing.assert_allclose(hidden, uncached.hidden, atol=1e-5)
    np.testing.assert_allclose(taps, uncached.taps, atol=1e-5)


def test_rows_decode_at_positions_of_their_own(run, uncached, tiny_config):
    prefixes = np.array([3, 11, 7])
    mask = np.arange(12)[None] < prefixes[:, None]
    cache = run(TOKENS[:, :12], positions_from_mask(jnp.asarray(mask)), cache_of(tiny_config, 1e4)).cache
    for step in range(4):
        at = (prefixes + step)[:, None]
        out = run(np.take_along_axis(TOKENS, at, 1), jnp.asarray(at, jnp.int32), cache)
        cache = out.cache
        expected = np.take_along_axis(np.asarray(uncached.hidden), at[..., None], axis=1)
        np.testing.assert_allclose(out.hidden, expected, atol=1e-5)


@pytest.mark.parametrize("cached", [False, True], ids=["uncached", "cached"])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_a_padded_prompt_gives_what_it_gives_alone(run, tiny_config, side, cached):
    lengths, width = (4, 9, 9), 12
    mask = np.zeros((3, width), bool)
    padded = np.random.default_rng(3).integers(0, 97, (3, width)).astype(np.int32)
    for row, length in enumerate(lengths):
        start = {"left": width - length, "right": 0, "both": 1}[side]
        mask[row, start : start + length] = True
        padded[row, mask[row]] = TOKENS[row, :length]
    cache = (cache_of(tiny_config, 1e4),) if cached else ()
    out = run(padded, positions_from_mask(jnp.asarray(mask)), *cache)
    for row, length in enumerate(lengths):
        alone = run(TOKENS[row : row + 1, :length], positions_of(length, 1))
        np.testing.assert_allclose(out.hidden[row][mask[row]], alone.hidden[0], atol=1e-5)
        np.testing.assert_allclose(out.taps[:, row][:, mask[row]], alone.taps[:, 0], atol=1e-5)


def test_padding_and_positions_past_the_cache_write_nothing(run, tiny_config):
    cache = cache_of(tiny_config, 1.0)
    positions = np.full((3, 12), PADDING, np.int32)
    positions[0, :5] = [2, 3, PADDING, SLOTS, 100]
    after = run(TOKENS[:, :12], jnp.asarray(positions), cache).cache
    for name in ("k", "v"):
        changed = np.any(np.asarray(after[name]) != np.asarray(cache[name]), axis=(1, 2, 3))
        np.testing.assert_array_equal(np.argwhere(changed), [[0, 2], [0, 3]])


def test_positions_count_the_real_tokens_wherever_padding_stands():
    mask = jnp.array([[False, False, True, True], [True, True, True, False], [True, False, True, True]])
    p = PADDING
    np.testing.assert_array_equal(positions_from_mask(mask), [[p, p, 0, 1], [0, 1, 2, p], [0, p, 1, 2]])


def test_normalized_taps_are_rms_times_the_reading_norms_weight(tiny_config, tiny_params, uncached):
    scales = [*tiny_params["blocks"]["attention_norm"]["scale"], tiny_params["norm"]["scale"]]
    normalized = normalize_taps(tiny_params, tiny_config, TAPS, uncached.taps)
    for slot, tap in enumerate(TAPS):
        raw = np.asarray(uncached.taps[slot], np.float64)
        rms = np.sqrt(np.mean(raw**2, axis=-1, keepdims=True) + tiny_config.rms_norm_eps)
        np.testing.assert_allclose(normalized[slot], raw / rms * np.asarray(scales[tap]), atol=1e-5)
    np.testing.assert_allclose(normalized[TAPS.index(tiny_config.num_layers)], uncached.hidden, atol=1e-6)


@pytest.mark.parametrize(("platform", "activations"), [("cpu", jnp.float32), ("gpu", jnp.bfloat16)])
def test_bfloat16_is_near_float32(platform, activations, tiny_config, tiny_params, uncached):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny_params)
    model = Llama(
        tiny_config, TAPS, jnp.bfloat16, partitioner=OtherPlatform(platform), compute=Compute(attention="xla")
    )
    cache = init_cache(tiny_config, 3, SLOTS, model.activation_dtype)

    @jax.jit
    def forward(params):
        out = model.apply({"params": params}, jnp.asarray(TOKENS), positions_of(24, 3), cache)
        return out, model.apply({"params": params}, out.hidden, method="logits")

    out, logits = forward(half)
    assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {jnp.dtype(activations)}
    assert logits.dtype == jnp.float32
    for ours, exact in ((out.hidden, uncached.hidden), (out.taps, uncached.taps)):
        error = np.linalg.norm(ours.astype(jnp.float32) - exact) / np.linalg.norm(exact)
        assert 1e-4 < error < 0.03


def test_llama_7b_has_the_parameters_of_llama_7b():
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32, num_kv_heads=32,
        head_dim=128,
    )  # fmt: skip
    assert config.num_params == 6_738_415_616
    assert dataclasses.replace(config, tie_word_embeddings=True).num_params == 6_738_415_616 - 32000 * 4096
    for bias in (False, True):
        other = dataclasses.replace(config, num_kv_heads=8, attention_bias=bias, mlp_bias=bias)
        leaves = jax.tree.leaves(init_params(other, abstract=True))
        assert other.num_params == sum(leaf.size for leaf in leaves)
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


@pytest.mark.parametrize("compute", [Compute("xla"), Compute("blockwise", 2), Compute("auto", 100)])
def test_how_it_is_computed_changes_nothing(uncached, tiny_config, tiny_params, compute):
    model = Llama(tiny_config, TAPS, compute=compute)
    found = jax.jit(model.apply)({"params": tiny_params}, TOKENS, positions_of(24, 3))
    np.testing.assert_allclose(found.hidden, uncached.hidden, atol=1e-5)
    np.testing.assert_allclose(found.taps, uncached.taps, atol=1e-5)
