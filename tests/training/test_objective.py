"""The objective against its formulas, and who learns from what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spa_jax.models.combine import ROUTED, combine
from spa_jax.models.plugin import correction, init_plugin, router_logits
from spa_jax.models.router import CONSULT, consult, consult_probability
from spa_jax.training.objective import RouterConfig, router_losses, summed_loss, token_outcomes
from spa_jax.training.outcomes import mean_metrics, token_metrics

TRAINABLE = ("spa", "s1", "s2", "s3")


WEIGHTED = RouterConfig("improvement", 0.0, True, False, False)


def gradient(world, plugin, params, router=WEIGHTED):
    def loss(params):
        return summed_loss(params, world.frozen, world.features, plugin=plugin, router=router, model=world.model)[0]

    return jax.jit(jax.grad(loss))(params)


def outcomes_of(world, plugin, params):
    def outcomes(params):
        return token_metrics(
            token_outcomes(plugin, world.model, params, world.frozen, world.features, plugin.threshold),
            plugin.threshold,
        )

    return jax.jit(outcomes)(params)


def corrections(world, plugin, params):
    def g(params):
        return correction(plugin, params, jnp.moveaxis(world.features.taps, 1, 0), world.features.positions)[0]

    return jax.jit(g)(params)


def assert_trees_close(found, expected):
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    assert largest > 0.01
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * largest, rtol=1e-3), found, expected)


@pytest.mark.parametrize("weighted", [True, False])
def test_router_losses_by_hand(weighted):
    logits = np.array([[[0.0, 2.0], [0.0, 2.0], [1.0, -1.0], [0.5, 0.5]]], np.float32)
    gain = np.array([[1.0, -0.5, 0.3, 0.2]], np.float32)
    p = np.array([0.880797, 0.880797, 0.119203, 0.5])  # softmax by pocket calculator
    ask = np.array([True, False, True, False])  # a gain of the margin itself is not worth an exchange
    excess = np.array([0.8, 0.7, 0.1, 0.0])
    expected = -np.log(np.where(ask, p, 1 - p)) * (excess if weighted else 1)
    assert CONSULT == 1
    losses = router_losses(
        RouterConfig("improvement", 0.2, weighted, False, False), jnp.asarray(logits), jnp.asarray(gain)
    )
    np.testing.assert_allclose(losses[0], expected, rtol=1e-4, atol=1e-6)


def test_weighted_labels_put_p_where_the_expected_gain_decides():
    gains = jnp.array([[1.0, -0.2, -0.2, -0.2]])  # asked for by sum, not by count

    def slope(weighted):
        def loss(p_logit):
            logits = jnp.zeros((1, 4, 2)).at[..., CONSULT].set(p_logit)
            return jnp.sum(router_losses(RouterConfig("improvement", 0.0, weighted, False, False), logits, gains))

        return jax.grad(loss)(0.0)

    assert slope(True) < 0 < slope(False)


@pytest.mark.parametrize("setting", TRAINABLE)
def test_outcomes_are_the_losses_of_what_enters_the_head(setting, world, make_plugin, plain_losses):
    p = consult_probability(router_logits(make_plugin("spa")[1], world.features.states))
    plugin, params = make_plugin(setting, threshold=float(np.median(p)))
    f = world.features
    found = outcomes_of(world, plugin, params)
    g = corrections(world, plugin, params)
    sigma = np.ones(f.targets.shape, bool)
    if setting in ROUTED:
        sigma = np.asarray(consult(router_logits(params, f.states), plugin.threshold))
        assert 0.3 < sigma.mean() < 0.7
    entering = {
        "base": f.states,
        "consulted": f.states + g if setting in ("spa", "s1") else g,
        "combined": combine(setting, f.states, g, jnp.asarray(sigma)),
    }
    for name, hidden in entering.items():
        np.testing.assert_allclose(
            found[name], plain_losses(world.model, world.frozen, hidden, f.targets), rtol=1e-4, atol=1e-4
        )
    assert np.all(found["oracle"] <= np.minimum(np.minimum(found["consulted"], found["base"]), found["combined"]))
    np.testing.assert_array_equal(found["usage"], sigma)
    assert np.abs(found["consulted"] - found["base"]).max() > 0.1


def test_a_fresh_spa_plugin_costs_exactly_what_the_base_costs(world, make_plugin):
    plugin, _ = make_plugin("spa", threshold=0.4)
    outcomes = outcomes_of(world, plugin, init_plugin(plugin))
    assert np.all(outcomes["usage"] == 1)
    for name in ("consulted", "combined", "oracle"):
        np.testing.assert_array_equal(outcomes[name], outcomes["base"])


@pytest.mark.parametrize("setting", ["spa", "s2"])
def test_the_side_network_learns_from_the_always_on_path_alone(setting, world, make_plugin, plain_losses):
    plugin, params = make_plugin(setting)
    f = world.features

    def always_on(side):
        g = corrections(world, plugin, {**params, "side": side})
        entering = g if setting in ("s2", "s3") else f.states + g
        return jnp.sum(f.weights * plain_losses(world.model, world.frozen, entering, f.targets))

    assert_trees_close(gradient(world, plugin, params)["side"], jax.jit(jax.grad(always_on))(params["side"]))


def test_the_router_learns_from_its_labels_alone(world, make_plugin):
    plugin, params = make_plugin("spa")
    f, config = world.features, RouterConfig("improvement", -0.1, True, False, False)
    outcomes = outcomes_of(world, plugin, params)
    gain = outcomes["base"] - outcomes["consulted"]
    labels = np.asarray(gain)[np.asarray(f.weights) > 0] > config.margin
    assert 0 < labels.mean() < 1

    def labelled(router):
        return jnp.sum(f.weights * router_losses(config, router_logits({"router": router}, f.states), gain))

    assert_trees_close(gradient(world, plugin, params, config)["router"], jax.grad(labelled)(params["router"]))


@pytest.mark.parametrize("setting", ["s1", "s3"])
def test_unrouted_settings_have_no_router_to_train(setting, world, make_plugin):
    plugin, params = make_plugin(setting)
    assert set(params) == {"side"}
    assert set(gradient(world, plugin, params)) == {"side"}


def test_padding_weighs_nothing(world, make_plugin):
    plugin, params = make_plugin("spa")
    f = world.features
    padding = f.weights[..., None] == 0
    noisy = f._replace(
        states=jnp.where(padding, 100.0, f.states), base_loss=jnp.where(f.weights == 0, 9.0, f.base_loss)
    )
    for a, b in zip(*(jax.tree.leaves(gradient(world._replace(features=x), plugin, params)) for x in (f, noisy))):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_means_are_per_token_and_named_by_the_setting():
    sums = {"base": 8.0, "consulted": 4.0, "combined": 5.0, "oracle": 3.0, "usage": 1.0, "tokens": 2.0}
    expected = {"loss/base": 4.0, "loss/always": 2.0, "loss/s2": 2.5, "loss/oracle": 1.5, "router/usage": 0.5}
    assert mean_metrics(sums, "s2") == expected
