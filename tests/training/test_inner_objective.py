"""Training with corrections in front of an inner block, against equation 1 on whole runs of the backbone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spa_jax.models.llama import Llama
from spa_jax.models.plugin import PluginConfig, init_plugin
from spa_jax.models.side import SideConfig
from spa_jax.training.corrected import corrected_row, run_upper
from spa_jax.training.features import extract, kept_for
from spa_jax.training.objective import RouterConfig, token_outcomes
from spa_jax.training.outcomes import token_metrics
from spa_jax.training.plugin_recipe import PluginRecipe
from spa_jax.training.vocabulary_loss import token_losses
from tests.training.by_turns import every_position, expected_outcomes, make_rows, new_tokens, random_plugin, take

MARGIN = 0.1


def make(setting, entry, edits, kind, tiny_config, offset=False):
    taps = {0: (0,), 2: (0, 2), "head": (0, 2, 3)}[entry]
    side = SideConfig(kind, 8, taps, heads=2)
    plugin = PluginConfig(setting, side, tiny_config.hidden_size, 0.5, offset, entry, edits)
    return plugin, Llama(tiny_config, taps, entry=entry)


@functools.partial(jax.jit, static_argnums=(0, 1))
def outcomes_and_base(plugin, model, params, frozen, batch, threshold):
    """Computes the outcomes, and the losses of uncorrected states in the same way as those of corrected ones."""
    features = extract(model, frozen, batch, kept_for(plugin))
    row = corrected_row(model, frozen, features, plugin.edits == "all")
    outcomes = token_outcomes(plugin, model, params, frozen, features, threshold)
    return outcomes, token_losses(model, frozen, run_upper(model, frozen, row, row.states), features.targets)


@pytest.mark.parametrize(
    ("setting", "entry", "edits", "kind"),
    [
        ("spa", 0, "all", "transformer"),
        ("spa", 2, "targets", "tokenwise"),
        ("spa", "head", "targets", "tokenwise"),
        ("s1", 2, "all", "tokenwise"),
        pytest.param("s1", 0, "targets", "transformer", marks=pytest.mark.slow),
        pytest.param("s1", "head", "targets", "transformer", marks=pytest.mark.slow),
    ],
)
def test_a_fresh_plugin_equals_the_base_whoever_is_asked(setting, entry, edits, kind, tiny_config, tiny_params):
    plugin, model = make(setting, entry, edits, kind, tiny_config)
    batch = make_rows(tiny_config.vocab_size)
    real = batch.weights > 0
    combined = []
    for threshold in (0.0, 1.0 if plugin.routed else 0.5):  # a fresh p is one half
        outcomes, uncorrected = outcomes_and_base(
            plugin, model, init_plugin(plugin), tiny_params, batch, np.float32(threshold)
        )
        metrics = token_metrics(outcomes, threshold)
        assert np.all(np.asarray(metrics["usage"]) == float(threshold < 1))
        np.testing.assert_array_equal(outcomes.always[real], uncorrected[real])
        for name in ("combined", "consulted", "oracle"):
            np.testing.assert_allclose(metrics[name][real], outcomes.base[real], atol=1e-5, err_msg=name)
        combined.append(metrics["combined"][real])
    np.testing.assert_array_equal(*combined)


RUNS = [
    ("spa", 2, "targets", "tokenwise", RouterConfig(margin=MARGIN, offset=True)),
    ("s2", 0, "all", "transformer", RouterConfig(margin=MARGIN, weighted=False)),
    ("spa", 0, "targets", "transformer", RouterConfig(margin=MARGIN, labels="always")),
    ("s2", 2, "targets", "tokenwise", RouterConfig("straight_through")),
]
SLOW_RUNS = [
    ("spa", 0, "targets", "transformer", RouterConfig(margin=MARGIN, labels="always", cross_fit=True)),
    ("spa", 2, "all", "transformer", RouterConfig(margin=MARGIN, cross_fit=True)),
    ("s2", 0, "targets", "transformer", RouterConfig(margin=MARGIN, labels="always", offset=True)),
    ("s1", 0, "targets", "transformer", RouterConfig()),
    ("s3", 0, "targets", "transformer", RouterConfig()),
    ("s3", 2, "all", "tokenwise", RouterConfig()),
    ("spa", 2, "all", "transformer", RouterConfig("straight_through")),
    ("s2", 0, "targets", "tokenwise", RouterConfig("soft")),
    ("spa", 0, "all", "tokenwise", RouterConfig("soft")),
]


def expected_loss(params, plugin, router, model, frozen, batch, base, losses):
    """The objective's sum over target tokens and the sums to report, by equation 1 and whole runs."""

    def share(p):
        hard = jax.lax.stop_gradient((p > plugin.threshold).astype(p.dtype) - p)
        return p if router.objective == "soft" else p + hard

    def outcomes_by(side):
        return expected_outcomes(plugin, model, {**params, "side": side}, frozen, batch, losses, share)

    def with_and_without(outcomes):
        if router.labels == "always":
            return outcomes.always, outcomes.never if router.offset else base
        both = outcomes.combined, outcomes.flipped
        consulted, unconsulted = (jnp.where(s, *both) for s in (outcomes.sigma, ~outcomes.sigma))
        if plugin.edits == "all":  # the last token of a prompt leaves no choice
            unconsulted = jnp.where(take(new_tokens(), batch.predict), unconsulted, consulted)
        return consulted, unconsulted

    sides = jax.tree.map(lambda leaf: leaf[None], params["side"])
    if router.cross_fit:
        sides = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), sides, params["folds"])
    by_side = jax.lax.map(outcomes_by, sides)
    found, *folds = (jax.tree.map(lambda leaf, i=i: leaf[i], by_side) for i in range(3 if router.cross_fit else 1))
    weights = jnp.asarray(batch.weights)
    total, sums = found.always, {"base": base, "consulted": found.always, "combined": found.always, "usage": weights}
    if plugin.routed:
        sums |= {"combined": found.combined, "usage": found.sigma.astype(jnp.float32)}
        consulted, unconsulted = with_and_without(found)
        if router.labels == "always":
            sums["combined"] = jnp.where(found.sigma, consulted, unconsulted)
        sums["oracle"] = jnp.minimum(consulted, unconsulted)
    else:
        sums["oracle"] = jnp.minimum(found.always, base)
    if router.objective != "improvement":
        total = sums["combined"] = found.mixed
        del sums["oracle"], sums["consulted"]
    elif plugin.routed:
        if router.offset:
            total = total + found.never
        if router.cross_fit:
            row_fold = jnp.sum(batch.targets * batch.weights.astype(np.int32), axis=1, keepdims=True) % 2
            for number, fold in enumerate(folds):
                total = total + jnp.where(row_fold == number, 0.0, fold.always)
            labels = [with_and_without(fold) for fold in folds]
            consulted, unconsulted = (jnp.where(row_fold == 0, a, b) for a, b in zip(*labels))
        excess = jax.lax.stop_gradient(unconsulted - consulted) - router.margin
        says = jnp.where(excess > 0, found.probability, 1 - found.probability)
        router_loss = -jnp.log(says) * (jnp.abs(excess) if router.weighted else 1.0)
        total = total + (
            jnp.where(take(new_tokens(), batch.predict), router_loss, 0) if plugin.edits == "all" else router_loss
        )
    return jnp.sum(weights * total), {name: jnp.sum(weights * value) for name, value in sums.items()}


@pytest.mark.parametrize(
    ("setting", "entry", "edits", "kind", "router"),
    [*RUNS, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_RUNS)],
)
def test_objective_and_gradient_are_those_of_whole_runs(
    setting, entry, edits, kind, router, tiny_config, tiny_params, plain_losses
):
    plugin, model = make(setting, entry, edits, kind, tiny_config, router.offset)
    batch, params = make_rows(tiny_config.vocab_size), random_plugin(plugin)
    if router.cross_fit:
        others = [jax.tree.map(lambda leaf, by=by: by * leaf, params["side"]) for by in (0.5, 1.5)]
        params["folds"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *others)

    @jax.jit
    def both(params, frozen, batch):
        recipe = PluginRecipe(plugin, False, router)
        states, _, _ = model.apply({"params": frozen}, batch.tokens, every_position(), method="lower")
        hidden, _ = model.apply({"params": frozen}, states, every_position(), method="upper")
        base = plain_losses(model, frozen, take(hidden, batch.predict), batch.targets)
        found = jax.value_and_grad(lambda params: recipe.loss(model, params, frozen, batch), has_aux=True)
        written_out = jax.value_and_grad(expected_loss, has_aux=True)
        args = (plugin, router, model, frozen, batch, base, plain_losses)
        return found(params), written_out(params, *args)

    ((total, sums), gradient), ((expected, expected_sums), expected_gradient) = both(params, tiny_params, batch)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert sums.pop("tokens") == batch.weights.sum()
    assert sums.keys() == expected_sums.keys()
    for name, found in sums.items():
        np.testing.assert_allclose(found, expected_sums[name], rtol=1e-5, err_msg=name)
    assert not plugin.routed or 0 < sums["usage"] < batch.weights.sum()
    assert np.abs(sums["combined"] - sums["base"]) > 0.02  # what is compared is closer
    flat, expected_flat = (jax.tree_util.tree_leaves_with_path(tree) for tree in (gradient, expected_gradient))
    for (keys, a), (_, b) in zip(flat, expected_flat, strict=True):
        largest = np.abs(b).max()
        assert largest > 1e-3 or keys[-1].key == "gate"  # which one tap does not use
        np.testing.assert_allclose(a, b, atol=1e-4 * max(largest, 1e-3), err_msg=jax.tree_util.keystr(keys))
