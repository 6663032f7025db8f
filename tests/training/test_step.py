"""One optimizer step: parts weigh by their tokens, and only the plugin moves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spa_jax.training.objective import RouterConfig, summed_loss
from spa_jax.training.outcomes import sum_tokens, token_metrics
from spa_jax.training.plugin_recipe import PluginRecipe
from spa_jax.training.step import eval_step, init_state, train_step

ROUTER = RouterConfig("improvement", 0.0, True, False, False)
SGD = optax.sgd(1.0)


@pytest.fixture(scope="module")
def gradient_by_step(world, make_plugin):
    """Returns a function that gives what one step of plain SGD at rate 1 subtracts, and the sums it reports, by batch
    and number of parts."""
    plugin, params = make_plugin("spa")

    def gradient(batch, accumulate=1, cached=True):
        recipe = PluginRecipe(plugin, cached, ROUTER)
        state = init_state(jax.tree.map(jnp.copy, params), SGD)
        state, sums = train_step(recipe, world.model, SGD, accumulate, state, world.frozen, batch)
        assert int(state.step) == 1
        return jax.tree.map(np.subtract, params, state.params), sums

    return gradient


@pytest.fixture(scope="module")
def whole(gradient_by_step, world):
    return gradient_by_step(world.features)


def norm(tree):
    return np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree)))


def distance(a, b):
    return norm(jax.tree.map(np.subtract, a, b)) / norm(a)


def test_a_step_is_the_gradient_of_the_mean_over_tokens(whole, world, make_plugin):
    plugin, params = make_plugin("spa")

    def mean_loss(params):
        total, sums = summed_loss(params, world.frozen, world.features, plugin=plugin, router=ROUTER, model=world.model)
        return total / sums["tokens"]

    expected = jax.jit(jax.grad(mean_loss))(params)
    found, sums = whole
    assert all(np.any(leaf) for leaf in jax.tree.leaves(found))
    assert distance(expected, found) < 1e-5
    np.testing.assert_allclose(sums["gradient_norm"], norm(expected), rtol=1e-5)
    assert int(sums["tokens"]) == 36


def test_accumulation_gives_the_same_step(whole, gradient_by_step, world):
    found, sums = gradient_by_step(world.features, accumulate=4)
    assert distance(whole[0], found) < 1e-5
    for name, value in whole[1].items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-5)


def test_a_mean_of_the_means_of_the_parts_would_be_another_step(whole, gradient_by_step, world):
    f = world.features
    parts = [f._replace(weights=f.weights.at[:row].set(0).at[row + 2 :].set(0)) for row in range(0, 8, 2)]
    gradients = [gradient_by_step(part)[0] for part in parts]
    naive = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *gradients)
    assert distance(whole[0], naive) > 0.1


def test_tokens_in_two_parts_give_the_same_step_as_their_features(whole, gradient_by_step, world):
    found, sums = gradient_by_step(world.batch, accumulate=2, cached=False)
    assert distance(whole[0], found) < 1e-4
    np.testing.assert_allclose(sums["base"], whole[1]["base"], rtol=1e-5)


def test_evaluation_reports_what_the_step_reports(whole, world, make_plugin):
    plugin, params = make_plugin("spa")
    outcomes, weights = eval_step(
        PluginRecipe(plugin, True), world.model, params, world.frozen, world.features, plugin.threshold
    )
    found = sum_tokens(token_metrics(outcomes, plugin.threshold), weights)
    assert {*found, "gradient_norm"} == set(whole[1])
    for name, value in found.items():
        np.testing.assert_allclose(value, whole[1][name], rtol=1e-5)


def test_a_step_leaves_the_backbone_alone(gradient_by_step, world):
    before = jax.tree.map(lambda leaf: np.asarray(leaf).tobytes(), world.frozen)
    for _ in range(3):
        gradient_by_step(world.features)
    assert jax.tree.map(lambda leaf: np.asarray(leaf).tobytes(), world.frozen) == before
