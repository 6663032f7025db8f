"""The schedule's corners, and what weight decay and clipping reach."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spa_jax.models.plugin import PluginConfig, init_plugin
from spa_jax.models.side import SideConfig
from spa_jax.training.optimizer import OptimizerConfig, make_optimizer, schedule

CONFIG = OptimizerConfig(
    learning_rate=0.5, warmup_fraction=0.1, final_fraction=0.2, weight_decay=0.1, clip_norm=0.0, beta1=0.9, beta2=0.999
)


def test_the_rate_rises_to_its_peak_and_falls_to_its_end():
    rates = [float(schedule(CONFIG, 100)(step)) for step in (0, 5, 10, 55, 100)]
    np.testing.assert_allclose(rates, [0, 0.25, 0.5, 0.3, 0.1], atol=1e-3)


@pytest.mark.parametrize("steps", [1, 2])
def test_the_shortest_runs_have_a_schedule(steps):
    assert np.isfinite(float(schedule(CONFIG, steps)(steps)))


def test_weights_decay_and_vectors_do_not():
    params = init_plugin(PluginConfig("spa", SideConfig("tokenwise", 4, (0, 1, 2)), 8), abstract=True)
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), params)
    tx = make_optimizer(CONFIG, 100)

    @jax.jit
    def updated_twice(params):  # the first rate is 0
        zero = jax.tree.map(jnp.zeros_like, params)
        _, state = tx.update(zero, tx.init(params), params)
        return tx.update(zero, state, params)[0]

    updates = updated_twice(params)
    decayed = {path[-1].key for path, leaf in jax.tree_util.tree_leaves_with_path(updates) if np.any(leaf)}
    assert decayed == {"down", "adapter_in", "adapter_out", "output", "kernel"}


def test_clipping_bounds_the_norm_and_zero_does_not_clip():
    gradient, params = ({"router": {"kernel": jnp.array(each)}} for each in ([30.0, 40.0], [0.0, 0.0]))

    def first_moment(clip_norm):
        tx = make_optimizer(OptimizerConfig(0.5, 0.1, 0.2, 0.0, clip_norm, 0.0, 0.999), 100)
        _, state = tx.update(gradient, tx.init(params), params)
        return next(leaf for leaf in jax.tree.leaves(state) if leaf.shape == (2,))

    np.testing.assert_allclose(first_moment(1.0), [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(first_moment(0.0), [30.0, 40.0], rtol=1e-6)
