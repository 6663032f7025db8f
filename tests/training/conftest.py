"""A small backbone, and what it makes of a batch of random rows."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spa_jax.data.pipeline import Batch
from spa_jax.models.combine import Setting
from spa_jax.models.llama import Llama, Params
from spa_jax.models.plugin import PluginConfig, init_plugin
from spa_jax.models.side import SideConfig
from spa_jax.training.features import AT_TARGETS, Features, extract

TAPS = (0, 2, 3)


class World(NamedTuple):
    """Backbone, and eight rows with 1 to 8 targets each as tokens and as features."""

    model: Llama
    frozen: Params
    batch: Batch
    features: Features


@pytest.fixture(scope="session")
def world(tiny_config, tiny_params) -> World:
    rng = np.random.default_rng(3)
    rows, length, width = 8, 16, 8
    counts = np.arange(1, rows + 1)
    batch = Batch(
        tokens=rng.integers(0, tiny_config.vocab_size, (rows, length)).astype(np.int32),
        lengths=np.full(rows, length, np.int32),
        predict=np.broadcast_to(np.arange(width, dtype=np.int32) + 7, (rows, width)).copy(),
        targets=rng.integers(0, tiny_config.vocab_size, (rows, width)).astype(np.int32),
        weights=(np.arange(width) < counts[:, None]).astype(np.float32),
    )
    model = Llama(tiny_config, TAPS)
    return World(
        model, tiny_params, batch, jax.jit(extract, static_argnums=(0, 3))(model, tiny_params, batch, AT_TARGETS)
    )


@pytest.fixture(scope="session")
def make_plugin(tiny_config) -> Callable[..., tuple[PluginConfig, Params]]:
    """A plugin of some setting with random parameters, so that g and sigma say something."""

    def make(setting: Setting, threshold: float = 0.5) -> tuple[PluginConfig, Params]:
        config = PluginConfig(setting, SideConfig("tokenwise", 8, TAPS), tiny_config.hidden_size, threshold)
        rng = np.random.default_rng(5)

        def random(leaf: jax.ShapeDtypeStruct) -> jax.Array:
            return jnp.asarray(np.float32(0.15 * rng.standard_normal(leaf.shape)))

        return config, jax.tree.map(random, init_plugin(config, abstract=True))

    return make


@pytest.fixture(scope="session")
def plain_losses() -> Callable[..., jax.Array]:
    """-log softmax of the whole vocabulary at once, the textbook's way."""

    @functools.partial(jax.jit, static_argnums=0)
    def losses(model: Llama, frozen: Params, hidden: jax.Array, targets: jax.Array) -> jax.Array:
        log_p = jax.nn.log_softmax(model.apply({"params": frozen}, hidden, method="logits"), axis=-1)
        return -jnp.take_along_axis(log_p, jnp.asarray(targets)[..., None], axis=-1)[..., 0]

    return losses
