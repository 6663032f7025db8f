"""What is minimised: the side network's loss, and what teaches the router when to ask.

`improvement`, the default: g is trained as if the device were always asked, and the router learns the label "the
plugin's loss on this token beats the base's by more than the margin". `straight_through` is equation 3 of the paper
taken
literally: the hard sigma forward, the gradient of the soft p backward. `soft` uses p in place of sigma.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from spa_jax.models.combine import mix, with_correction, without_correction
from spa_jax.models.llama import Llama, Params
from spa_jax.models.plugin import PluginConfig, correction, offset_of, router_logits
from spa_jax.models.router import CONSULT, consult_probability
from spa_jax.training.features import Features
from spa_jax.training.vocabulary_loss import token_losses

Sums = dict[str, Float[Array, ""]]
"""Sums over target tokens, so that they add up over batches; `tokens` is their count."""

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
        least;
            `improvement` only.
        cross_fit: take each label from a side network that was not trained on that row: two more are trained, each on
            half of the rows. Labels from the main one are made on rows it has memorised, and flatter it; `improvement`
            only.
        offset: learn a constant `[D]` that the cloud adds to f where it does not ask, and judge the plugin by what it
            gains over that; `improvement` only. The paper has none.
    """

    objective: Objective
    margin: float
    weighted: bool
    cross_fit: bool
    offset: bool


class Outcomes(NamedTuple):
    """What either path makes of each target token."""

    base: Float[Array, "B R"]
    """Cross-entropy of f alone, nats."""
    skipped: Float[Array, "B R"]
    """Cross-entropy where the device is not asked; `base`, unless the router has a constant."""
    always: Float[Array, "B R"]
    """Cross-entropy with the device asked, nats."""
    probability: Float[Array, "B R"]
    """p(consult); 1 in a setting without a router."""


def corrections(plugin: PluginConfig, params: Params, features: Features, model: Llama) -> Float[Array, "B R D"]:
    """g where targets are predicted."""
    taps = jnp.moveaxis(features.taps, 1, 0)
    g, _ = correction(plugin, params, taps, features.positions, dtype=model.dtype)
    return jnp.take_along_axis(g, features.reads[:, :, None], axis=1) if plugin.side.attends else g


def token_outcomes(plugin: PluginConfig, model: Llama, params: Params, frozen: Params, features: Features) -> Outcomes:
    """Losses with and without the plugin, and what the router says."""
    g = corrections(plugin, params, features, model)
    asked = token_losses(model, frozen, with_correction(plugin.setting, features.hidden, g), features.targets)
    base = features.base_loss
    if not plugin.routed:
        return Outcomes(base, base, asked, jnp.ones_like(asked))
    unasked = base
    if plugin.offset:
        unasked = token_losses(model, frozen, without_correction(features.hidden, offset_of(params)), features.targets)
    return Outcomes(base, unasked, asked, consult_probability(router_logits(params, features.hidden)))


def per_token(outcomes: Outcomes, threshold: float) -> dict[str, Float[Array, "B R"]]:
    """`base`, `always`, `combined` (the loss under sigma), `oracle` (the smaller of the two, what a perfect router
    reaches), all in nats, and `usage` (sigma as 0 or 1)."""
    sigma = outcomes.probability > threshold
    return {
        "base": outcomes.base,
        "always": outcomes.always,
        "combined": jnp.where(sigma, outcomes.always, outcomes.skipped),
        "oracle": jnp.minimum(outcomes.always, outcomes.skipped),
        "usage": sigma.astype(jnp.float32),
    }


def sums(values: dict[str, Float[Array, "B R"]], weights: Float[Array, "B R"]) -> Sums:
    """Values summed over target tokens, with the tokens themselves."""
    return {**{name: jnp.sum(weights * value) for name, value in values.items()}, "tokens": jnp.sum(weights)}


def router_losses(
    config: RouterConfig, logits: Float[Array, "B R 2"], gain: Float[Array, "B R"]
) -> Float[Array, "B R"]:
    """Cross-entropy of the label gain > margin; `gain` is the loss without the plugin minus that with it, in nats."""
    excess = jax.lax.stop_gradient(gain) - config.margin
    log_p = jax.nn.log_softmax(logits, axis=-1)
    losses = -jnp.where(excess > 0, log_p[..., CONSULT], log_p[..., 1 - CONSULT])
    return losses * jnp.abs(excess) if config.weighted else losses


def summed_loss(
    params: Params, frozen: Params, features: Features, *, plugin: PluginConfig, router: RouterConfig, model: Llama
) -> tuple[Float[Array, ""], Sums]:
    """The objective summed over target tokens, and the sums to report; gradients reach `params` alone."""
    if plugin.routed and router.objective != "improvement":
        return _through_the_router(params, frozen, features, plugin, router, model)
    outcomes = token_outcomes(plugin, model, params, frozen, features)
    total = outcomes.always
    if plugin.routed:
        asked = outcomes.always
        if plugin.offset:
            total = total + outcomes.skipped
        if router.cross_fit:
            fold_losses, asked = _fold_losses(params, frozen, features, plugin, model)
            total = total + fold_losses
        logits = router_logits(params, features.hidden)
        total = total + router_losses(router, logits, outcomes.skipped - asked)
    return jnp.sum(features.weights * total), sums(per_token(outcomes, plugin.threshold), features.weights)


def _through_the_router(
    params: Params, frozen: Params, features: Features, plugin: PluginConfig, router: RouterConfig, model: Llama
) -> tuple[Float[Array, ""], Sums]:
    g = corrections(plugin, params, features, model)
    p = consult_probability(router_logits(params, features.hidden))
    sigma = p > plugin.threshold
    share = p if router.objective == "soft" else p + jax.lax.stop_gradient(sigma - p)
    losses = token_losses(model, frozen, mix(plugin.setting, features.hidden, g, share), features.targets)
    values = {"base": features.base_loss, "combined": losses, "usage": sigma.astype(jnp.float32)}
    return jnp.sum(features.weights * losses), sums(values, features.weights)


def _fold_of(features: Features) -> Bool[Array, "B 1"]:
    """Which half a row belongs to; rows with the same target, such as phrasings of one question, stay together."""
    return jnp.sum(features.targets * features.weights.astype(jnp.int32), axis=1, keepdims=True) % FOLDS


def _fold_losses(
    params: Params, frozen: Params, features: Features, plugin: PluginConfig, model: Llama
) -> tuple[Float[Array, "B R"], Float[Array, "B R"]]:
    """Per token: the loss that trains the fold networks, and the loss of the one that has not seen the row."""

    def losses_of(side: Params) -> Float[Array, "B R"]:
        return token_outcomes(plugin, model, {**params, "side": side}, frozen, features).always

    losses = jax.lax.map(losses_of, params["folds"])
    fold = _fold_of(features)
    held_out = jnp.where(fold == 0, losses[0], losses[1])
    return jnp.sum(losses, axis=0) - held_out, jax.lax.stop_gradient(held_out)


def means(summed: dict[str, float], setting: str) -> dict[str, float]:
    """Per-token metrics of what was summed, by the names in metrics.jsonl."""
    count = max(summed["tokens"], 1.0)
    names = {"base": "loss/base", "always": "loss/always", "combined": f"loss/{setting}", "oracle": "loss/oracle"}
    names["usage"] = "router/usage"
    return {key: summed[name] / count for name, key in names.items() if name in summed}
