"""The objective of a plugin: the side network's loss, and the loss that teaches the router when to ask.

`improvement`, the default, trains g as if the device were always asked, and teaches the router the label "the plugin's
loss on this token is below the base's by more than the margin". `straight_through` takes equation 3 of the paper
literally: the hard sigma forward, the gradient of the soft p backward. `soft` uses p in place of sigma.

Shape letters: B rows of a batch, R target tokens of a row, D backbone width.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from spa_jax.models.combine import mix, with_correction, without_correction
from spa_jax.models.llama import Llama, Params
from spa_jax.models.plugin import PluginConfig, correction, offset_of, router_logits
from spa_jax.models.router import CONSULT, consult_probability
from spa_jax.training.features import Features
from spa_jax.training.outcomes import Outcomes, Sums, sum_tokens, token_metrics
from spa_jax.training.vocabulary_loss import token_losses

Objective = Literal["improvement", "straight_through", "soft"]

FOLDS = 2
"""Side networks trained beside the main one when router labels are cross-fitted."""


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """How the router learns.

    Attributes:
        objective: see the module.
        margin: nats by which the plugin must beat the base for the label "ask the device"; `improvement` only.
        weighted: weigh each label by how far the gain is from the margin, which puts the mistakes where they cost
            least; `improvement` only.
        cross_fit: take each label from a side network that was not trained on that row: two more are trained, each on
            half of the rows. Labels from the main one are made on rows it has memorised, and flatter it; `improvement`
            only.
        offset: learn a constant `[D]` that the cloud adds to f where it does not ask, and judge the plugin by what it
            gains over that; `improvement` only. The paper has none.
    """

    objective: Objective = "improvement"
    margin: float = 0.5
    weighted: bool = True
    cross_fit: bool = False
    offset: bool = False


def corrections(plugin: PluginConfig, params: Params, features: Features, model: Llama) -> Float[Array, "B R D"]:
    """Computes g at the positions that predict targets."""
    taps = jnp.moveaxis(features.taps, 1, 0)
    g, _ = correction(plugin, params, taps, features.positions, dtype=model.dtype)
    return jnp.take_along_axis(g, features.reads[:, :, None], axis=1) if plugin.side.attends else g


def token_outcomes(plugin: PluginConfig, model: Llama, params: Params, frozen: Params, features: Features) -> Outcomes:
    """Computes the losses with and without the plugin, and the router's probabilities."""
    g = corrections(plugin, params, features, model)
    consulted = token_losses(model, frozen, with_correction(plugin.setting, features.hidden, g), features.targets)
    base = features.base_loss
    if not plugin.routed:
        return Outcomes(base, base, consulted, jnp.ones_like(consulted))
    unconsulted = base
    if plugin.offset:
        state = without_correction(features.hidden, offset_of(params))
        unconsulted = token_losses(model, frozen, state, features.targets)
    return Outcomes(base, unconsulted, consulted, consult_probability(router_logits(params, features.hidden)))


def router_losses(
    config: RouterConfig, logits: Float[Array, "B R 2"], gain: Float[Array, "B R"]
) -> Float[Array, "B R"]:
    """Computes the router's cross-entropy on the label gain > margin.

    Args:
        config: margin, and whether labels are weighted.
        logits: of the router.
        gain: the loss without the plugin minus the loss with it, in nats.
    """
    excess = jax.lax.stop_gradient(gain) - config.margin
    log_p = jax.nn.log_softmax(logits, axis=-1)
    losses = -jnp.where(excess > 0, log_p[..., CONSULT], log_p[..., 1 - CONSULT])
    return losses * jnp.abs(excess) if config.weighted else losses


def summed_loss(
    params: Params, frozen: Params, features: Features, *, plugin: PluginConfig, router: RouterConfig, model: Llama
) -> tuple[Float[Array, ""], Sums]:
    """Sums the objective over target tokens; gradients reach `params` alone.

    Returns:
        The sum, and the sums to report.
    """
    if plugin.routed and router.objective != "improvement":
        return _through_the_router(params, frozen, features, plugin, router, model)
    outcomes = token_outcomes(plugin, model, params, frozen, features)
    total = outcomes.consulted
    if plugin.routed:
        label_loss = outcomes.consulted
        if plugin.offset:
            total = total + outcomes.unconsulted
        if router.cross_fit:
            fold_losses, label_loss = _fold_losses(params, frozen, features, plugin, model)
            total = total + fold_losses
        logits = router_logits(params, features.hidden)
        total = total + router_losses(router, logits, outcomes.unconsulted - label_loss)
    return jnp.sum(features.weights * total), sum_tokens(token_metrics(outcomes, plugin.threshold), features.weights)


def _through_the_router(
    params: Params, frozen: Params, features: Features, plugin: PluginConfig, router: RouterConfig, model: Llama
) -> tuple[Float[Array, ""], Sums]:
    g = corrections(plugin, params, features, model)
    p = consult_probability(router_logits(params, features.hidden))
    sigma = p > plugin.threshold
    share = p if router.objective == "soft" else p + jax.lax.stop_gradient(sigma.astype(p.dtype) - p)
    losses = token_losses(model, frozen, mix(plugin.setting, features.hidden, g, share), features.targets)
    values = {"base": features.base_loss, "combined": losses, "usage": sigma.astype(jnp.float32)}
    return jnp.sum(features.weights * losses), sum_tokens(values, features.weights)


def _fold_of(features: Features) -> Int[Array, "B 1"]:
    """Assigns each row to a fold; rows with the same target, such as phrasings of one question, stay together."""
    return jnp.sum(features.targets * features.weights.astype(jnp.int32), axis=1, keepdims=True) % FOLDS


def _fold_losses(
    params: Params, frozen: Params, features: Features, plugin: PluginConfig, model: Llama
) -> tuple[Float[Array, "B R"], Float[Array, "B R"]]:
    """Computes each token's loss that trains the fold networks, and its loss by the network that has not seen the
    row."""

    def losses_of(side: Params) -> Float[Array, "B R"]:
        return token_outcomes(plugin, model, {**params, "side": side}, frozen, features).consulted

    losses = jax.lax.map(losses_of, params["folds"])
    fold = _fold_of(features)
    held_out = jnp.where(fold == 0, losses[0], losses[1])
    return jnp.sum(losses, axis=0) - held_out, jax.lax.stop_gradient(held_out)
