"""Straight-through, soft and cross-fitted routers, and the budget."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spa_jax.errors import UserError
from spa_jax.models.plugin import correction, init_plugin, router_logits
from spa_jax.models.router import consult_probability
from spa_jax.training.objective import RouterConfig, summed_loss
from spa_jax.training.outcomes import threshold_for
from spa_jax.training.run import train


def loss_and_gradient(world, plugin, params, router):
    """((loss, sums), gradient) of all rows."""

    def loss(params):
        return summed_loss(params, world.frozen, world.features, plugin=plugin, router=router, model=world.model)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


def gradients(world, plugin, router, *cases):
    """The gradient of each case of parameters and features, by one program."""

    def loss(params, features):
        return summed_loss(params, world.frozen, features, plugin=plugin, router=router, model=world.model)[0]

    gradient = jax.jit(jax.grad(loss))
    return [gradient(params, features) for params, features in cases]


def close(found, expected):
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    assert largest > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * largest, rtol=1e-3), found, expected)


def mixture(world, plugin, plain_losses, share_of):
    """The loss of f and g mixed by `share_of(p)`, written out."""
    f = world.features

    def loss(params):
        g = correction(plugin, params, jnp.moveaxis(f.taps, 1, 0), f.positions)[0]
        share = share_of(consult_probability(router_logits(params, f.states)))[..., None]
        state = f.states + share * g if plugin.setting == "spa" else (1 - share) * f.states + share * g
        return jnp.sum(f.weights * plain_losses(world.model, world.frozen, state, f.targets))

    return loss


@pytest.mark.parametrize("setting", ["spa", "s2"])
def test_soft_is_the_loss_of_the_mixture_by_p(setting, world, make_plugin, plain_losses):
    plugin, params = make_plugin(setting)
    expected = jax.jit(jax.grad(mixture(world, plugin, plain_losses, lambda p: p)))(params)
    close(loss_and_gradient(world, plugin, params, RouterConfig("soft", 0.0, True, False, False))[1], expected)


@pytest.mark.parametrize("setting", ["spa", "s2"])
def test_straight_through_is_hard_forward_and_soft_backward(setting, world, make_plugin, plain_losses):
    p = consult_probability(router_logits(make_plugin(setting)[1], world.features.states))
    plugin, params = make_plugin(setting, threshold=float(np.median(p)))
    hard = (np.asarray(p) > plugin.threshold).astype(np.float32)
    assert 0.3 < hard.mean() < 0.7
    router = RouterConfig("straight_through", 0.0, True, False, False)
    shift = hard - np.asarray(p)  # a constant that makes the soft mixture take the hard values
    written_out = mixture(world, plugin, plain_losses, lambda p: p + shift)
    expected, expected_gradient = jax.jit(jax.value_and_grad(written_out))(params)
    (total, _), found = loss_and_gradient(world, plugin, params, router)
    np.testing.assert_allclose(total, expected, rtol=1e-4)
    close(found, expected_gradient)


@pytest.mark.parametrize("setting", ["spa", "s2"])
def test_the_offset_learns_alone_and_the_router_learns_what_asking_gains_over_it(
    setting, world, make_plugin, plain_losses
):
    plugin, params = make_plugin(setting)
    plugin, f = dataclasses.replace(plugin, offset=True), world.features
    params["router"]["offset"] = jnp.asarray(0.3 * np.random.default_rng(1).standard_normal(f.states.shape[-1]))

    def written_out(params):
        g = correction(plugin, params, jnp.moveaxis(f.taps, 1, 0), f.positions)[0]
        asked = plain_losses(world.model, world.frozen, f.states + g if setting == "spa" else g, f.targets)
        constant = jnp.broadcast_to(params["router"]["offset"], f.states.shape)
        unasked = plain_losses(world.model, world.frozen, f.states + constant, f.targets)
        p = consult_probability(router_logits(params, f.states))
        excess = jax.lax.stop_gradient(unasked - asked) - 0.1
        router = -jnp.log(jnp.where(excess > 0, p, 1 - p)) * jnp.abs(excess)
        return jnp.sum(f.weights * (asked + unasked + router))

    router = RouterConfig("improvement", 0.1, True, False, True)
    expected, expected_gradient = jax.jit(jax.value_and_grad(written_out))(params)
    (total, sums), found = loss_and_gradient(world, plugin, params, router)
    np.testing.assert_allclose(total, expected, rtol=1e-4)
    close(found, expected_gradient)
    assert sums["oracle"] < min(sums["consulted"], sums["combined"])


@pytest.mark.slow
def test_a_fold_network_never_learns_from_the_rows_it_labels(world, make_plugin):
    plugin, params = make_plugin("spa")
    others = [make_plugin("spa")[1]["side"] for _ in range(2)]
    params = {**params, "folds": jax.tree.map(lambda *leaves: jnp.stack(leaves), *others)}
    router = RouterConfig("improvement", 0.0, True, True, False)
    f = world.features
    fold = np.sum(f.targets * f.weights.astype(jnp.int32), axis=1) % 2
    assert 0 < fold.mean() < 1
    alone = (
        f._replace(weights=f.weights * (np.arange(len(fold)) == row)[:, None].astype(np.float32))
        for row in range(len(fold))
    )
    found = gradients(world, plugin, router, *((params, row) for row in alone))
    for number, gradient in zip(fold, found, strict=True):
        assert not np.any(gradient["folds"]["output"][number])
        assert np.any(gradient["folds"]["output"][1 - number])


def test_cross_fitted_labels_come_from_the_network_that_has_not_seen_the_row(world, make_plugin):
    plugin, params = make_plugin("spa")
    silent = jax.tree.map(jnp.zeros_like, params["side"])
    folds = jax.tree.map(lambda a, b: jnp.stack([a, b]), silent, params["side"])
    router = RouterConfig("improvement", 0.1, True, True, False)
    plain = RouterConfig("improvement", 0.1, True, False, False)
    f = world.features
    fold = np.sum(f.targets * f.weights.astype(jnp.int32), axis=1) % 2
    halves = [f._replace(weights=f.weights * (fold == number)[:, None].astype(np.float32)) for number in (0, 1)]
    found = gradients(world, plugin, router, *(({**params, "folds": folds}, half) for half in halves))
    sides = ({**params, "side": side} for side in (silent, params["side"]))
    expected = gradients(world, plugin, plain, *zip(sides, halves))
    for ours, theirs in zip(found, expected, strict=True):
        close(ours["router"], theirs["router"])


def test_the_budget_is_kept_as_nearly_as_it_can_be():
    p = np.random.default_rng(0).random(1000)
    for budget in (0.1, 0.62, 0.9):
        share = (p > threshold_for(p, budget)).mean()
        assert budget - 0.002 <= share <= budget
    assert (p > threshold_for(p, 1.0)).mean() >= 0.999
    assert not np.any(np.ones(5) > threshold_for(np.ones(5), 0.5))


def test_a_random_router_starts_apart_from_one_half(make_plugin):
    plugin, _ = make_plugin("spa")
    assert np.any(init_plugin(plugin, random_router=True)["router"]["kernel"])
    assert not np.any(init_plugin(plugin)["router"]["kernel"])


@pytest.mark.parametrize(
    "keys",
    [
        {"router.objective": "soft"},
        {"router.objective": "straight_through", "setting": "s2"},
        {"router.cross_fit": True, "router.budget": 0.4},
        {"router.offset": True},
        pytest.param({"side.kind": "transformer", "side.heads": 2}, marks=pytest.mark.slow),
        {"side.kind": "transformer", "side.heads": 2, "side.init": "pruned"},
    ],
    ids=lambda keys: ",".join(map(str, keys.values())),
)
def test_every_kind_of_run_learns(keys, make_config, tmp_path):
    summary = train(make_config({"train.epochs": 15, "train.eval_every": 45, **keys}), tmp_path / "run")
    setting = keys.get("setting", "spa")
    assert summary[f"loss/{setting}"] < 0.8 * summary["loss/base"]
    if "router.budget" in keys:
        assert summary["router/usage"] <= 0.4


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"setting": "s1", "router.objective": "soft"}, "no router"),
        ({"setting": "s3", "router.budget": 0.5}, "no router"),
        ({"router.objective": "soft", "router.cross_fit": True}, "cross_fit"),
        ({"router.objective": "soft", "router.offset": True}, "offset"),
        ({"setting": "s1", "router.offset": True}, "no router"),
        ({"side.kind": "transformer", "side.heads": 5}, "side.heads=5"),
        ({"side.init": "pruned"}, "side.init"),
    ],
)
def test_options_that_mean_nothing_are_refused(keys, named, make_config):
    with pytest.raises(UserError, match=named):
        make_config(keys)


@pytest.mark.slow
def test_the_tap_cache_changes_nothing_for_a_side_network_that_attends(make_config, tmp_path):
    keys = {"side.kind": "transformer", "side.heads": 2}
    found = [
        train(make_config({**keys, "tap_cache.enabled": enabled}), tmp_path / str(enabled)) for enabled in (True, False)
    ]
    assert found[0]["loss/always"] == pytest.approx(found[1]["loss/always"], rel=1e-4)
    assert found[0]["loss/always"] != pytest.approx(found[0]["loss/base"], rel=1e-2)
