"""The transformer side network against PyTorch's LLaMA layers, and its cache against no cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spa_jax.decoding.cache import init_cache
from spa_jax.models.block import PADDING
from spa_jax.models.plugin import PluginConfig, correction, init_plugin
from spa_jax.models.side import SideConfig

TAPS, D, E, HEADS = (0, 2, 3), 32, 16, 2
CONFIG = PluginConfig("s3", SideConfig("transformer", E, TAPS, HEADS), D)
ROWS, LENGTH = 2, 9


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(1)
    shapes = init_plugin(CONFIG, abstract=True)
    return jax.tree.map(lambda leaf: jnp.asarray(np.float32(0.3 * rng.standard_normal(leaf.shape))), shapes)


@pytest.fixture(scope="module")
def taps():
    return jnp.asarray(np.float32(np.random.default_rng(2).standard_normal((len(TAPS), ROWS, LENGTH, D))))


POSITIONS = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), (ROWS, LENGTH))
g_of = jax.jit(correction, static_argnums=0)


def test_the_ladder_is_llama_layers_with_gates_between(params, taps):
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaModel

    c, side = CONFIG.side.block, jax.tree.map(np.asarray, params["side"])
    model = LlamaModel(
        LlamaConfig(
            vocab_size=1, hidden_size=E, intermediate_size=c.intermediate_size, num_hidden_layers=len(TAPS),
            num_attention_heads=HEADS, rms_norm_eps=c.rms_norm_eps, attn_implementation="eager",
        )
    ).eval()  # fmt: skip
    block = side["ladder"]["block"]

    def tensor(array, *shape):
        return torch.from_numpy(np.array(array).reshape(shape).T.copy())

    states = torch.from_numpy(np.einsum("pbtd,pde->pbte", taps, side["down"]))
    with torch.no_grad():
        model.norm.weight.copy_(tensor(side["norm"]["scale"], E))
        for p, layer in enumerate(model.layers):
            layer.input_layernorm.weight.copy_(tensor(block["attention_norm"]["scale"][p], E))
            layer.post_attention_layernorm.weight.copy_(tensor(block["mlp_norm"]["scale"][p], E))
            for name in "qkv":
                weight = getattr(layer.self_attn, f"{name}_proj").weight
                weight.copy_(tensor(block["attention"][name]["kernel"][p], E, E))
            layer.self_attn.o_proj.weight.copy_(tensor(block["attention"]["o"]["kernel"][p], E, E))
            for name in ("gate", "up", "down"):
                kernel = block["mlp"][name]["kernel"][p]
                getattr(layer.mlp, f"{name}_proj").weight.copy_(tensor(kernel, *kernel.shape))
            mu = 0 if p == 0 else float(1 / (1 + np.exp(-side["ladder"]["gate"][p] / 0.1)))

            def mix(module, args, kwargs, mu=mu, p=p):
                return (mu * args[0] + (1 - mu) * states[p], *args[1:]), kwargs

            layer.register_forward_pre_hook(mix, with_kwargs=True)
        expected = model(inputs_embeds=states[0]).last_hidden_state.numpy() @ side["output"]
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(g_of(CONFIG, params, taps, POSITIONS)[0], expected, atol=1e-4)


@pytest.mark.parametrize("chunks", [(9,), (4, 5), (3, *[1] * 6)])
def test_cached_equals_uncached(params, taps, chunks):
    expected, _ = g_of(CONFIG, params, taps, POSITIONS)
    cache = jax.tree.map(lambda leaf: leaf + 1e4, init_cache(CONFIG.side.block, ROWS, LENGTH + 3, jnp.float32))
    found, start = [], 0
    for size in chunks:
        window = slice(start, start + size)
        g, cache = g_of(CONFIG, params, taps[:, :, window], POSITIONS[:, window], cache)
        found.append(g)
        start += size
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), expected, atol=1e-5)


def test_padding_on_either_side_changes_nothing(params, taps):
    expected, _ = g_of(CONFIG, params, taps, POSITIONS)
    noise = jnp.full((len(TAPS), ROWS, 3, D), 50.0)
    padding = jnp.full((ROWS, 3), PADDING, jnp.int32)
    for left in (True, False):
        sides = (noise, taps) if left else (taps, noise)
        places = (padding, POSITIONS) if left else (POSITIONS, padding)
        g, _ = g_of(CONFIG, params, jnp.concatenate(sides, axis=2), jnp.concatenate(places, axis=1))
        np.testing.assert_allclose(g[:, 3:] if left else g[:, :LENGTH], expected, atol=1e-5)


def test_it_attends_over_the_prompt(params, taps):
    expected, _ = g_of(CONFIG, params, taps, POSITIONS)
    changed, _ = g_of(CONFIG, params, taps.at[:, :, 0].add(1.0), POSITIONS)
    assert np.abs(changed[:, -1] - expected[:, -1]).max() > 1e-3


def test_a_fresh_one_adds_nothing_in_spa(taps):
    config = PluginConfig("spa", CONFIG.side, D)
    assert not np.any(g_of(config, init_plugin(config), taps, POSITIONS)[0])
