"""The chunked loss against log-softmax over the whole vocabulary."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spa_jax.models.llama import Llama, init_params
from spa_jax.models.plugin import PluginConfig, init_plugin
from spa_jax.models.side import SideConfig
from spa_jax.training.features import Features
from spa_jax.training.objective import RouterConfig
from spa_jax.training.plugin_recipe import PluginRecipe
from spa_jax.training.step import init_state, train_step
from spa_jax.training.vocabulary_loss import CHUNK, token_losses


def loss_and_gradient(function, *arguments):
    model, frozen, hidden, targets, cotangent = arguments

    @jax.jit
    def both(frozen, hidden):
        losses, pull_back = jax.vjp(lambda h: function(model, frozen, h, targets), hidden)
        return losses, pull_back(cotangent)[0]

    return both(frozen, hidden)


@pytest.mark.parametrize(
    ("count", "tied", "dtype"),
    [
        (1, False, "float32"),
        (CHUNK, False, "float32"),
        (CHUNK + 1, True, "float32"),
        (2 * CHUNK + 44, False, "float32"),
        (CHUNK + 1, False, "bfloat16"),
    ],
)
def test_loss_and_gradient_equal_log_softmax(count, tied, dtype, tiny_config, plain_losses):
    config = dataclasses.replace(tiny_config, tie_word_embeddings=tied)
    frozen = init_params(config, seed=1)
    rng = np.random.default_rng(count)
    hidden = jnp.asarray(3 * rng.standard_normal((count, config.hidden_size)), dtype)
    targets = jnp.asarray(rng.integers(0, config.vocab_size, count), jnp.int32)
    cotangent = jnp.asarray(np.float32(rng.standard_normal(count)))
    exact = (Llama(config), frozen, hidden.astype(jnp.float32), targets, cotangent)
    expected, expected_gradient = loss_and_gradient(plain_losses, *exact)
    losses, gradient = loss_and_gradient(
        token_losses, Llama(config, dtype=jnp.dtype(dtype)), frozen, hidden, targets, cotangent
    )
    assert losses.dtype == jnp.float32
    assert gradient.dtype == hidden.dtype
    # Logits are summed in float32, but of weights that are rounded to 8 bits.
    tolerance = 1e-5 if dtype == "float32" else 0.03
    np.testing.assert_allclose(losses, expected, atol=tolerance)
    assert np.abs(expected_gradient).max() > 0.1
    np.testing.assert_allclose(np.asarray(gradient, np.float32), expected_gradient, atol=tolerance)


def test_rows_keep_their_shape(world, plain_losses):
    f = world.features
    losses = token_losses(world.model, world.frozen, f.states, f.targets)
    np.testing.assert_allclose(losses, plain_losses(world.model, world.frozen, f.states, f.targets), rtol=1e-5)
    np.testing.assert_array_equal(losses, f.base_loss)


def test_a_step_on_cached_features_holds_no_array_of_positions_times_vocabulary(tiny_config):
    rows, taps, vocabulary = 8, (1, 3), 20_000
    config = dataclasses.replace(tiny_config, vocab_size=vocabulary)
    d = config.hidden_size
    plugin = PluginConfig("spa", SideConfig("tokenwise", 8, taps), d)
    tx = optax.sgd(0.1)
    recipe, model = (
        PluginRecipe(plugin, True, RouterConfig("improvement", 0.0, True, False, False)),
        Llama(config, taps),
    )
    state = jax.eval_shape(lambda: init_state(init_plugin(plugin), tx))
    frozen = init_params(config, abstract=True)

    def temporary_bytes(targets: int) -> int:
        shapes = [(rows, targets, d), (rows, len(taps), targets, d)] + 5 * [(rows, targets)]
        dtypes = [jnp.float32] * 3 + [jnp.int32, jnp.float32, jnp.int32, jnp.int32]
        features = Features(*map(jax.ShapeDtypeStruct, shapes, dtypes))
        lowered = train_step.lower(recipe, model, tx, 1, state, frozen, features)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    few, many = 32, 256
    growth = temporary_bytes(many) - temporary_bytes(few)
    assert growth < 0.1 * rows * (many - few) * vocabulary * 4
