"""Side network, router and the five settings against closed forms and plain NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spa_jax.choices import SETTINGS
from spa_jax.errors import UserError
from spa_jax.models.block import LlamaConfig
from spa_jax.models.combine import ADDED, ROUTED, combine
from spa_jax.models.llama import Llama, init_params, normalize_taps
from spa_jax.models.plugin import (
    PluginConfig,
    correction,
    count_params,
    init_plugin,
    router_logits,
    select_taps,
)
from spa_jax.models.router import consult, consult_probability
from spa_jax.models.side import SideConfig

D, E, TAPS = 32, 5, (0, 2, 3)
LLAMA_7B = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32, num_kv_heads=32,
    head_dim=128,
)  # fmt: skip


def plugin_config(setting, taps=TAPS, threshold=0.5):
    return PluginConfig(setting, SideConfig("tokenwise", E, taps), D, threshold)


def trained(config):
    """Random parameters, those that start at zero too."""
    rng = np.random.default_rng(4)
    shapes = init_plugin(config, abstract=True)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype), shapes)


def g_of(config, params, taps):
    return correction(config, params, taps, jnp.zeros(taps.shape[1:3], jnp.int32))[0]


@functools.cache
def fresh(setting):
    return init_plugin(plugin_config(setting))


@pytest.fixture(scope="module")
def base_and_plugin_logits(tiny_config, tiny_params):
    """(setting, trainable, sigma) -> logits of f and of the setting's mixture of f and g, from one compiled program."""
    model = Llama(tiny_config, TAPS)
    tokens = jnp.asarray(np.random.default_rng(5).integers(0, 97, (2, 9)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32)[None], (2, 9))

    @functools.partial(jax.jit, static_argnums=0)
    def both(setting, frozen, trainable, sigma):
        out = model.apply({"params": frozen}, tokens, positions)
        normalized = normalize_taps(frozen, tiny_config, TAPS, out.taps)
        g, _ = correction(plugin_config(setting), trainable, normalized, positions)
        mixed = combine(setting, out.hidden, g, jnp.broadcast_to(sigma, tokens.shape))
        return tuple(model.apply({"params": frozen}, state, method="logits") for state in (out.hidden, mixed))

    return lambda setting, trainable, sigma: both(setting, tiny_params, trainable, jnp.full((1, 1), sigma))


@pytest.mark.parametrize("setting", ADDED)
def test_a_fresh_plugin_equals_the_base_and_a_trained_one_does_not(setting, base_and_plugin_logits):
    for sigma in (False, True):
        base, mixed = base_and_plugin_logits(setting, fresh(setting), sigma)
        np.testing.assert_array_equal(base, mixed)
        base, mixed = base_and_plugin_logits(setting, trained(plugin_config(setting)), sigma)
        asked = sigma or setting not in ROUTED
        assert np.array_equal(base, mixed) != asked
        assert (np.abs(base - mixed).max() > 0.1) == asked


def test_a_fresh_plugin_says_something_only_where_it_replaces_f():
    taps = jnp.asarray(np.float32(np.random.default_rng(6).standard_normal((3, 1, 2, D))))
    for setting in ("s2", "s3"):
        assert np.abs(g_of(plugin_config(setting), fresh(setting), taps)).min() > 0
    for setting in ADDED:
        assert not np.any(g_of(plugin_config(setting), fresh(setting), taps))


@pytest.mark.parametrize("setting", SETTINGS)
def test_combine_follows_its_formula(setting):
    rng = np.random.default_rng(7)
    f, g = rng.standard_normal((2, 2, 6, D)).astype(np.float32)
    sigma = rng.random((2, 6)) < 0.5
    s = sigma[..., None].astype(np.float32)
    expected = {"spa": f + s * g, "s1": f + g, "s2": (1 - s) * f + s * g, "s3": g, "base": f}[setting]
    np.testing.assert_array_equal(combine(setting, jnp.asarray(f), jnp.asarray(g), jnp.asarray(sigma)), expected)


def test_the_offset_enters_where_the_device_is_not_asked_and_nowhere_else():
    rng = np.random.default_rng(8)
    f, g = (jnp.asarray(x, jnp.float32) for x in rng.standard_normal((2, 2, 6, D)))
    sigma, offset = rng.random((2, 6)) < 0.5, jnp.asarray(np.float32(rng.standard_normal(D)))
    for setting in SETTINGS:
        found = combine(setting, f, g, jnp.asarray(sigma), offset)
        plain = combine(setting, f, g, jnp.asarray(sigma))
        expected = np.where(sigma[..., None], plain, np.asarray(f) + np.asarray(offset)) if setting in ROUTED else plain
        np.testing.assert_array_equal(found, expected)


def test_combine_ignores_a_correction_that_was_not_asked_for():
    f, bad = jnp.ones((1, 2, D)), jnp.full((1, 2, D), jnp.nan)
    for setting in ROUTED:
        np.testing.assert_array_equal(combine(setting, f, bad, jnp.zeros((1, 2), bool)), f)


def test_combine_keeps_the_backbones_dtype():
    f, g = jnp.ones((1, 2, D), jnp.bfloat16), jnp.ones((1, 2, D))
    assert {combine(setting, f, g, jnp.ones((1, 2), bool)).dtype for setting in SETTINGS} == {jnp.dtype(jnp.bfloat16)}


def tokenwise_loop(params, taps):
    """The ladder as its docstring has it, for one position `[P,D]`."""
    w = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    s = taps[0] @ w["down"][0]
    for p in range(1, len(taps)):
        mu = 1 / (1 + np.exp(-w["gate"][p - 1] / 0.1))
        s = mu * s + (1 - mu) * (taps[p] @ w["down"][p])
        wide = np.maximum(s @ w["adapter_in"][p - 1] + w["adapter_in_bias"][p - 1], 0)
        s = s + wide @ w["adapter_out"][p - 1] + w["adapter_out_bias"][p - 1]
    return s @ w["output"]


@pytest.mark.parametrize("taps", [(0, 1, 2, 3), (3,)], ids=["four taps", "one tap"])
def test_tokenwise_side_is_the_ladder(taps):
    config = plugin_config("spa", taps)
    params = trained(config)
    values = np.random.default_rng(8).standard_normal((len(taps), 2, 3, D)).astype(np.float32)
    g = g_of(config, params, jnp.asarray(values))
    for row, column in np.ndindex(2, 3):
        expected = tokenwise_loop(params["side"], values[:, row, column])
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(g[row, column], expected, atol=1e-4)


def test_a_plugin_of_one_tap_can_be_made():
    params = init_plugin(plugin_config("spa", (3,)))["side"]
    assert {name: leaf.shape for name, leaf in params.items() if leaf.size} == {"down": (1, D, E), "output": (E, D)}


def test_a_fresh_ladder_mixes_half_and_half_with_weights_of_their_fan_in():
    side = fresh("s3")["side"]
    assert not np.any(side["gate"])
    for name, fan_in in (("down", D), ("adapter_in", E), ("adapter_out", D), ("output", E)):
        assert 0.7 < np.std(side[name]) * np.sqrt(fan_in) < 1.3


def test_only_routed_settings_have_a_router():
    routed = {s for s in SETTINGS if s != "base" and "router" in init_plugin(plugin_config(s), abstract=True)}
    assert routed == {"spa", "s2"}


def test_trainable_share_of_llama_7b_is_the_papers_two_permille():
    side = SideConfig("tokenwise", 32, select_taps("all", LLAMA_7B))
    abstract = init_plugin(PluginConfig("spa", side, LLAMA_7B.hidden_size), abstract=True)
    by_hand = 33 * 4096 * 32 + 32 * (1 + 2 * 32 * 4096 + 4096 + 32) + 32 * 4096 + 2 * 4096
    assert count_params(abstract) == by_hand
    backbone = count_params(init_params(LLAMA_7B, abstract=True))
    assert abs(100 * count_params(abstract) / backbone - 0.2) < 0.02


@pytest.mark.parametrize(
    ("spec", "taps"),
    [
        ("all", (0, 1, 2, 3, 4, 5, 6, 7, 8)),
        ("every:3", (2, 5, 8)),
        ("every:4", (0, 4, 8)),
        ("every:100", (8,)),
        ("last:2", (7, 8)),
        ("last:100", (0, 1, 2, 3, 4, 5, 6, 7, 8)),
        ("0", (0,)),
        ("1,8", (1, 8)),
    ],
)
def test_select_taps(spec, taps):
    assert select_taps(spec, dataclasses.replace(LLAMA_7B, num_layers=8)) == taps


@pytest.mark.parametrize(
    "spec", ["", "9", "3,2", "2,2", "1,", "-1", "every", "every:0", "every:x", "last:-1", "all:2", "some", "0;8", "1.5"]
)
def test_select_taps_refuses_what_is_no_tap_list_by_name(spec):
    with pytest.raises(UserError, match=r"side\.taps is '.*up to 8"):
        select_taps(spec, dataclasses.replace(LLAMA_7B, num_layers=8))


def test_a_fresh_router_is_undecided_and_does_not_ask():
    logits = router_logits(fresh("spa"), jnp.ones((1, 4, D)))
    np.testing.assert_array_equal(consult_probability(logits), np.full((1, 4), 0.5))
    assert not np.any(consult(logits))
    assert not np.any(consult(logits, 0.5))
    assert np.all(consult(logits, 0.4999))


def test_the_router_is_a_linear_softmax_on_hidden_over_the_threshold():
    params = trained(plugin_config("spa"))
    hidden = np.random.default_rng(9).standard_normal((2, 20, D)).astype(np.float32)
    scores = hidden @ np.asarray(params["router"]["kernel"])
    p = np.exp(scores[..., 1]) / np.exp(scores).sum(-1)
    logits = router_logits(params, jnp.asarray(hidden))
    np.testing.assert_allclose(consult_probability(logits), p, atol=1e-6)
    for threshold in (0.0, 0.25, 0.5, 0.9, 1.0):
        assert np.abs(p - threshold).min() > 1e-5
        np.testing.assert_array_equal(consult(logits, threshold), p > threshold)
    np.testing.assert_array_equal(consult(logits), np.argmax(scores, axis=-1) == 1)
