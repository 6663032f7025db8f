"""Pruning to full size is a copy; of a backbone with dead units, pruning keeps the live ones, and so the function."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spa_jax.errors import UserError
from spa_jax.models.block import Block, LlamaConfig, place_by_position, rope_frequencies
from spa_jax.models.llama import init_params
from spa_jax.models.plugin import PluginConfig, init_plugin
from spa_jax.models.pruning import prune
from spa_jax.models.quantized import keep_as_bits
from spa_jax.models.side import SideConfig

D = 24
FULL = LlamaConfig(
    vocab_size=7, hidden_size=D, intermediate_size=64, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6
)  # fmt: skip
POSITIONS = jnp.arange(5, dtype=jnp.int32)[None, :]


@pytest.fixture(scope="module")
def frozen():
    """Random weights, norms of the feed-forward layers away from 1 and those of attention at 1, as rungs have them."""
    params = init_params(FULL, seed=3)
    scale = np.asarray(params["blocks"]["mlp_norm"]["scale"])
    noise = np.random.default_rng(4).standard_normal(scale.shape)
    params["blocks"]["mlp_norm"]["scale"] = jnp.asarray(scale + 0.3 * noise, jnp.float32)
    return params


def rungs(side: SideConfig, frozen, config=FULL):
    fresh = init_plugin(PluginConfig("spa", side, config.hidden_size))["side"]
    return prune(side, config, frozen, fresh), fresh


@functools.partial(jax.jit, static_argnums=0)
def run_block(config, params, layer, x):
    positions = POSITIONS[:, : x.shape[1]]
    angles = positions.astype(jnp.float32)[:, :, None] * rope_frequencies(config)[None, None, :]
    one = jax.tree.map(lambda leaf: leaf[layer], params)
    places = place_by_position(positions, None)
    return Block(config, jnp.float32).apply({"params": one}, x, None, 0, angles, places)[0]


def test_pruned_to_full_size_a_rung_is_the_block_that_reads_its_tap(frozen):
    side = SideConfig("transformer", D, (0, 2, 3), heads=4)
    pruned, fresh = rungs(side, frozen)
    x = np.random.default_rng(0).standard_normal((1, 5, D)).astype(np.float32)
    for rung, block in enumerate((0, 2, 2)):
        ours = run_block(side.block, pruned["ladder"]["block"], rung, x)
        np.testing.assert_allclose(ours, run_block(FULL, frozen["blocks"], block, x), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(pruned["down"][rung], np.eye(D))
    for kept in ("norm", "output"):
        jax.tree.map(np.testing.assert_array_equal, pruned[kept], fresh[kept])
    np.testing.assert_array_equal(pruned["ladder"]["gate"], fresh["ladder"]["gate"])


@pytest.mark.parametrize(("heads", "length"), [(2, 5), pytest.param(3, 1, marks=pytest.mark.slow)])
def test_dead_units_are_the_ones_left_out(heads, length, frozen):
    """Zeroing what pruning should drop leaves a backbone block that computes what the small one does.

    Narrower heads turn by fewer frequencies, so they are compared on one token, which sees itself alone.
    """
    side = SideConfig("transformer", 12, (0, 1, 2), heads)
    rng = np.random.default_rng(0)
    channels = np.sort(rng.choice(D, 12, replace=False))
    blocks = jax.tree.map(np.array, frozen["blocks"])
    dead = np.setdiff1d(np.arange(D), channels)
    attention, mlp = blocks["attention"], blocks["mlp"]
    for kernel in (*(attention[name]["kernel"] for name in "qkv"), mlp["gate"]["kernel"], mlp["up"]["kernel"]):
        kernel[:, dead] = 0
    attention["o"]["kernel"][..., dead] = 0
    mlp["down"]["kernel"][..., dead] = 0
    for layer in range(3):
        gone = rng.choice(4, 4 - heads, replace=False)
        values = rng.choice(6, 6 - side.block.head_dim, replace=False)
        attention["v"]["kernel"][layer][..., values] = 0
        attention["o"]["kernel"][layer][:, values] = 0
        units = np.setdiff1d(np.arange(64), rng.choice(64, side.block.intermediate_size, replace=False))
        attention["q"]["kernel"][layer][:, gone] = 0
        attention["o"]["kernel"][layer][gone] = 0
        mlp["gate"]["kernel"][layer][:, units] = 0
        mlp["up"]["kernel"][layer][:, units] = 0
        mlp["down"]["kernel"][layer][units] = 0
    blocks = jax.tree.map(jnp.asarray, blocks)
    pruned, _ = rungs(side, {**frozen, "blocks": blocks})
    small = rng.standard_normal((1, length, 12)).astype(np.float32)
    wide = np.zeros((1, length, D), np.float32)
    wide[:, :, channels] = small
    # Zeros in a wide state lower its mean square, by which RMS norms divide.
    config = dataclasses.replace(FULL, rms_norm_eps=FULL.rms_norm_eps / 2)
    shrunk = {**blocks, "mlp_norm": {"scale": blocks["mlp_norm"]["scale"] / np.sqrt(2)}}
    shrunk["attention_norm"] = {"scale": blocks["attention_norm"]["scale"] / np.sqrt(2)}
    for layer in range(3):
        judge = run_block(config, shrunk, layer, wide)
        np.testing.assert_array_equal(np.asarray(judge)[..., dead], 0)
        ours = run_block(side.block, pruned["ladder"]["block"], layer, small)
        np.testing.assert_allclose(ours, np.asarray(judge)[..., channels], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(np.flatnonzero(np.asarray(pruned["down"])[layer].sum(1)), channels)


def test_rotary_pairs_keep_their_frequencies():
    """A head of half the width keeps every second pair; the pair's weights show which."""
    config = dataclasses.replace(FULL, head_dim=12, num_heads=2, num_kv_heads=1)
    frozen = init_params(config)
    q = frozen["blocks"]["attention"]["q"]["kernel"]
    frozen["blocks"]["attention"]["q"]["kernel"] = jnp.broadcast_to(jnp.arange(12.0)[None, None, None, :], q.shape)
    pruned, _ = rungs(SideConfig("transformer", 12, (1,), heads=2), frozen, config)
    np.testing.assert_array_equal(pruned["ladder"]["block"]["attention"]["q"]["kernel"][0, 0, 0], [0, 2, 4, 6, 8, 10])


@pytest.mark.parametrize(
    ("width", "heads", "named"), [(48, 4, "hidden_size"), (20, 5, "num_heads"), (16, 1, "head_dim")]
)
def test_a_side_network_wider_than_the_backbone_is_refused(frozen, width, heads, named):
    with pytest.raises(UserError, match=named):
        rungs(SideConfig("transformer", width, (0,), heads), frozen)


def test_matrices_kept_as_bits_are_pruned_as_floats(frozen):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), frozen)
    side = SideConfig("transformer", 12, (1, 3), 2)
    with jax.numpy_dtype_promotion("standard"):
        expected, _ = rungs(side, half)
        found, _ = rungs(side, keep_as_bits(half))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
