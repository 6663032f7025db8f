"""A backbone in 8 bits against rounding written out in NumPy, and against a float one with the same numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from spa_jax.errors import UserError
from spa_jax.models.compute import Compute
from spa_jax.models.llama import Llama, init_params
from spa_jax.models.quantized import CHANNELS, dequantize, keep_as_bits, need_floats, quantize, take_embeddings

TAPS, INT8 = (0, 2, 4), Compute(weights="int8")
SUMMED = dict.fromkeys(("embed", "q", "k", "v", "gate", "up", "down"), (1,)) | {"o": (1, 2), "lm_head": (0,)}
"""The axes of each parameter, blocks first, over which a scale is shared."""


def path_of(keys):
    return "/".join(key.key for key in keys if isinstance(key, jax.tree_util.DictKey))


@jax.jit
def in_8_bits(params):
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: quantize(path_of(keys), leaf), params)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def both(request, tiny_config):
    """Config, float parameters and the same in 8 bits."""
    config = dataclasses.replace(tiny_config, tie_word_embeddings=request.param)
    params = init_params(config, 3)
    return config, params, in_8_bits(params)


def test_values_and_scales_are_those_of_the_closed_form(both):
    config, params, quantized = both
    matrices = 0
    for keys, leaf in jax.tree_util.tree_leaves_with_path(quantized, is_leaf=lambda x: isinstance(x, qwix.QArray)):
        original = params
        for key in keys:
            original = original[key.key]
        if not isinstance(leaf, qwix.QArray):
            np.testing.assert_array_equal(leaf, original)
            assert "norm" in path_of(keys)
            continue
        matrices += 1
        w = np.asarray(original, np.float32)
        scale = np.abs(w).max(axis=SUMMED[keys[-2].key], keepdims=True) / np.float32(127.5)
        np.testing.assert_allclose(leaf.scale, scale, rtol=1e-6)
        expected = np.clip(np.round(w / scale), -127, 127)
        assert leaf.qvalue.dtype == jnp.int8
        assert np.mean(np.asarray(leaf.qvalue) != expected) < 1e-2  # a division by the scale may round either way
        assert np.max(np.abs(np.asarray(leaf.qvalue) - expected)) <= 1
        assert np.max(np.abs(dequantize(leaf) - w) / scale) < 0.51
    assert matrices == (8 if config.tie_word_embeddings else 9)


def test_the_model_is_the_float_one_with_rounded_weights(both):
    config, _, quantized = both
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (2, 9)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32), (2, 9))

    @functools.partial(jax.jit, static_argnums=0)
    def run(compute, params):
        model = Llama(config, TAPS, compute=compute)
        out = model.apply({"params": params}, tokens, positions)
        return out.hidden, out.taps, model.apply({"params": params}, out.hidden, method="logits")

    ours, theirs = run(INT8, quantized), run(Compute(), dequantize(quantized))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), ours, theirs)


def test_matrices_kept_as_bits_compute_the_same(tiny_config):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), init_params(tiny_config, 3))
    kept = keep_as_bits(jax.tree.map(jnp.copy, half))  # which takes its argument's memory
    dtypes = {path_of(keys): leaf.dtype for keys, leaf in jax.tree_util.tree_leaves_with_path(kept)}
    as_bits = {path for path, dtype in dtypes.items() if dtype == jnp.uint16}
    assert as_bits == {path for path in dtypes if path.startswith("blocks/") and path.endswith("/kernel")}
    assert len(as_bits) == 7
    model = Llama(tiny_config, TAPS, jnp.dtype(jnp.bfloat16))
    tokens = jnp.arange(12, dtype=jnp.int32)[None]
    found, expected = (jax.jit(model.apply)({"params": params}, tokens, tokens) for params in (kept, half))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    jax.tree.map(np.testing.assert_array_equal, dequantize(kept), half)


def test_rows_are_looked_up_before_they_are_floats():
    table = quantize("embed/embedding", jnp.asarray(np.float32(np.random.default_rng(1).standard_normal((50, 8)))))
    tokens = jnp.array([[3, 3], [49, 0]])
    np.testing.assert_array_equal(take_embeddings(table, tokens), dequantize(table)[tokens])
    lowered = jax.jit(take_embeddings).lower(table, tokens).as_text()
    assert "50x8xf32" not in lowered


def test_what_needs_floats_is_refused(both):
    _, params, quantized = both
    need_floats(params, "this")
    with pytest.raises(UserError, match="this needs a backbone whose weights are floats"):
        need_floats(quantized, "this")


def test_every_matrix_has_a_rule(both):
    _, params, quantized = both
    kept = [leaf for leaf in jax.tree.leaves(quantized) if leaf.dtype != jnp.int8]
    assert sum(leaf.size for leaf in kept) < sum(leaf.size for leaf in jax.tree.leaves(params)) / 8
    assert len(CHANNELS) == 5
