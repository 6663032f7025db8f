"""One optimizer step: parts weigh by their tokens, and only the plugin moves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spa_jax.training.objective import RouterConfig, per_token, summed_loss, sums
from spa_jax.training.step import init_state, make_eval_step, make_train_step

ROUTER = RouterConfig("improvement", 0.0, True, False)
SGD = optax.sgd(1.0)


def gradients_by_step(world, plugin, params, batches, accumulate=1):
    """What one step of plain SGD at rate 1 subtracts, and the sums it reports, for each batch."""
    step = make_train_step(plugin, ROUTER, world.model, SGD, accumulate)
    results = []
    for batch in batches:
        copied = jax.tree.map(jnp.copy, params)
        state, sums = step(init_state(copied, SGD), world.frozen, batch)
        assert int(state.step) == 1
        results.append((jax.tree.map(np.subtract, params, state.params), sums))
    return results


def norm(tree):
    return np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree)))


def distance(a, b):
    return norm(jax.tree.map(np.subtract, a, b)) / norm(a)


@pytest.fixture(scope="module")
def whole(world, make_plugin):
    return gradients_by_step(world, *make_plugin("spa"), [world.features])[0]


def test_a_step_is_the_gradient_of_the_mean_over_tokens(whole, world, make_plugin):
    plugin, params = make_plugin("spa")

    def mean_loss(params):
        total, sums = summed_loss(params, world.frozen, world.features, plugin=plugin, router=ROUTER, model=world.model)
        return total / sums["tokens"]

    expected = jax.jit(jax.grad(mean_loss))(params)
    found, sums = whole
    assert distance(expected, found) < 1e-5
    np.testing.assert_allclose(sums["gradient_norm"], norm(expected), rtol=1e-5)
    assert int(sums["tokens"]) == 36


def test_accumulation_gives_the_same_step(whole, world, make_plugin):
    [(found, sums)] = gradients_by_step(world, *make_plugin("spa"), [world.features], accumulate=4)
    assert distance(whole[0], found) < 1e-5
    for name, value in whole[1].items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-5)


def test_a_mean_of_the_means_of_the_parts_would_be_another_step(whole, world, make_plugin):
    parts = [jax.tree.map(lambda leaf, i=i: leaf[i : i + 2], world.features) for i in range(0, 8, 2)]
    gradients = [gradient for gradient, _ in gradients_by_step(world, *make_plugin("spa"), parts)]
    naive = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *gradients)
    assert distance(whole[0], naive) > 0.1


def test_tokens_in_two_parts_give_the_same_step_as_their_features(whole, world, make_plugin):
    [(found, sums)] = gradients_by_step(world, *make_plugin("spa"), [world.batch], accumulate=2)
    assert distance(whole[0], found) < 1e-4
    np.testing.assert_allclose(sums["base"], whole[1]["base"], rtol=1e-5)


def test_evaluation_reports_what_the_step_reports(whole, world, make_plugin):
    plugin, params = make_plugin("spa")
    outcomes, weights = make_eval_step(plugin, world.model)(params, world.frozen, world.features)
    found = sums(per_token(outcomes, plugin.threshold), weights)
    assert {*found, "gradient_norm"} == set(whole[1])
    for name, value in found.items():
        np.testing.assert_allclose(value, whole[1][name], rtol=1e-5)


def test_a_step_leaves_the_backbone_alone_and_needs_no_room_for_it(world, make_plugin):
    before = jax.tree.map(lambda leaf: np.asarray(leaf).tobytes(), world.frozen)
    plugin, params = make_plugin("spa")
    adam = optax.adamw(0.1)
    state = init_state(jax.tree.map(jnp.copy, params), adam)
    step = make_train_step(plugin, ROUTER, world.model, adam, accumulate=1)
    for _ in range(3):
        state, _ = step(state, world.frozen, world.features)
    assert jax.tree.map(lambda leaf: np.asarray(leaf).tobytes(), world.frozen) == before
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), params, state.params)
    assert all(jax.tree.leaves(moved))
    shapes = [leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sorted(shapes) == sorted(3 * [leaf.shape for leaf in jax.tree.leaves(params)])
