"""The objective of a plugin: the side network's loss, and the loss that teaches the router when to ask.

`improvement`, the default, trains g as if the device were always asked, and teaches the router the label "the plugin's
loss on this token is below the base's by more than the margin". `straight_through` takes equation 3 of the paper
literally: the hard sigma forward, the gradient of the soft p backward. `soft` uses p in place of sigma.

In front of an inner block a correction reaches later tokens too, so a token's loss depends on where the device was
asked before. g is trained as if the device were always asked. The label of a token is what asking there gains after a
history in which the device was asked as the router says; or (`labels=always`, cheaper) by how much the plugin that is
always asked beats the base. Where the prompt is corrected too, the router has no say in it, nor in the first new token,
which its last one predicts.

Shape letters: B rows of a batch, R target tokens of a row, M positions that are corrected, D backbone width.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from spa_jax.models.block import PADDING
from spa_jax.models.combine import mix, with_correction, without_correction
from spa_jax.models.llama import Llama, Params, normalize_state, unit
from spa_jax.models.plugin import PluginConfig, correction, offset_of, router_logits
from spa_jax.models.router import CONSULT, consult_probability
from spa_jax.training.corrected import Row, at_targets, corrected_row, run_upper, run_upper_with_alternatives
from spa_jax.training.features import Features
from spa_jax.training.outcomes import Outcomes, Sums, sum_tokens, token_metrics
from spa_jax.training.vocabulary_loss import token_losses

Objective = Literal["improvement", "straight_through", "soft"]
Labels = Literal["router", "always"]

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
        labels: what a label compares, see the module; where corrections enter at `head` both are one thing.
    """

    objective: Objective = "improvement"
    margin: float = 0.5
    weighted: bool = True
    cross_fit: bool = False
    offset: bool = False
    labels: Labels = "router"


class States(NamedTuple):
    """The candidate states at each corrected position, and p(consult) there."""

    row: Row
    g: Float[Array, "B M D"]
    """The correction, multiplied by its unit."""
    asked: Float[Array, "B M D"]
    """The state where the device is asked."""
    unasked: Float[Array, "B M D"]
    probability: Float[Array, "B M"]
    """p(consult); 1 in a setting without a router."""


def corrections(plugin: PluginConfig, params: Params, features: Features, model: Llama) -> Float[Array, "B M D"]:
    """Computes g at the positions that are corrected."""
    taps = jnp.moveaxis(features.taps, 1, 0)
    g, _ = correction(plugin, params, taps, features.positions, dtype=model.activation_dtype)
    if plugin.edits == "targets" and plugin.side.attends:
        return jnp.take_along_axis(g, features.reads[:, :, None], axis=1)
    return g


def possible_states(
    plugin: PluginConfig, model: Llama, params: Params, frozen: Params, features: Features, row: Row | None = None
) -> States:
    """Computes the states with and without the device at each position, by equation 1 of the paper or a variant; `row`
    is that of the features, where it is known already."""
    row = row or corrected_row(model, frozen, features, plugin.edits == "all")
    size = unit(model, row.states)
    g = size * corrections(plugin, params, features, model)
    asked = with_correction(plugin.setting, row.states, g)
    if not plugin.routed:
        return States(row, g, asked, row.states, jnp.ones(asked.shape[:2]))
    unasked, offset = row.states, offset_of(params)
    if offset is not None:
        predicts = jnp.any(jnp.arange(asked.shape[1])[None, :, None] == row.predicts[:, None, :], axis=2)
        with_offset = without_correction(row.states, size * offset.astype(size.dtype)[None, None, :])
        unasked = jnp.where(predicts[:, :, None], with_offset, row.states)
    logits = router_logits(params, normalize_state(frozen, model, row.states))
    probability = consult_probability(logits)
    if plugin.edits == "all":
        probability = jnp.where(_holds_new_token(features, row), probability, 1.0)
    return States(row, g, asked, unasked, probability)


def _is_last_of_prompt(features: Features) -> Bool[Array, "B R"]:
    """Tells which targets are predicted by the last token of a prompt, and not by a new one."""
    assert features.answers is not None
    return features.answers.predict == features.answers.answer_starts


def _holds_new_token(features: Features, row: Row) -> Bool[Array, "B M"]:
    """Tells which positions hold a new token, about which the router is asked; the others are the prompt's."""
    new = jnp.where(_is_last_of_prompt(features), PADDING, row.predicts)
    return jnp.any(jnp.arange(row.states.shape[1])[None, :, None] == new[:, None, :], axis=2)


def run_with_and_without_device(
    model: Llama, frozen: Params, states: States, threshold: float | Float[Array, ""]
) -> tuple[Bool[Array, "B R"], Float[Array, "B R D"], Float[Array, "B R D"]]:
    """Computes for each target sigma, and the LM head's inputs with and without the device for that token, after a
    history in which the device was asked as the router says."""
    sigma = states.probability > threshold
    taken, other = (jnp.where(s[:, :, None], states.asked, states.unasked) for s in (sigma, ~sigma))
    here, instead = run_upper_with_alternatives(model, frozen, states.row, taken, at_targets(states.row, other))
    sigma = at_targets(states.row, sigma)
    asked, unasked = (jnp.where(s[:, :, None], here, instead) for s in (sigma, ~sigma))
    return sigma, asked, unasked


def _losses(model: Llama, frozen: Params, features: Features, row: Row, states: Array) -> Float[Array, "B R"]:
    return token_losses(model, frozen, run_upper(model, frozen, row, states), features.targets)


def token_outcomes(
    plugin: PluginConfig,
    model: Llama,
    params: Params,
    frozen: Params,
    features: Features,
    threshold: float | Float[Array, ""],
) -> Outcomes:
    """Computes the losses with and without the plugin under a router's threshold, and the router's probabilities."""
    states = possible_states(plugin, model, params, frozen, features)
    return _outcomes(plugin, model, frozen, features, states, threshold, "router")


def _depends_on_history(model: Llama, labels: Labels) -> bool:
    """Tells whether a token's losses with and without the device are those after the router's own decisions."""
    return model.entry != "head" and labels == "router"


def _outcomes(
    plugin: PluginConfig,
    model: Llama,
    frozen: Params,
    features: Features,
    states: States,
    threshold: float | Float[Array, ""],
    labels: Labels,
) -> Outcomes:
    row, base = states.row, features.base_loss
    always = _losses(model, frozen, features, row, states.asked)
    if not plugin.routed:
        return Outcomes(base, always, base, always, at_targets(row, states.probability))
    probability = at_targets(row, states.probability)
    if not _depends_on_history(model, labels):
        unconsulted = _losses(model, frozen, features, row, states.unasked) if plugin.offset else base
        return Outcomes(base, always, unconsulted, always, probability)
    _, *both = run_with_and_without_device(model, frozen, jax.lax.stop_gradient(states), threshold)
    consulted, unconsulted = token_losses(model, frozen, jnp.stack(both), jnp.stack([features.targets] * 2))
    if plugin.edits == "all":  # the prompt's last token leaves no choice, unless the device is never asked
        unconsulted = jnp.where(_is_last_of_prompt(features) & (threshold < 1), consulted, unconsulted)
    return Outcomes(base, always, unconsulted, consulted, probability)


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
    states = possible_states(plugin, model, params, frozen, features)
    row = states.row
    if plugin.routed and router.objective != "improvement":
        return _mixture_loss(frozen, features, plugin, router, model, states)
    outcomes = _outcomes(plugin, model, frozen, features, states, plugin.threshold, router.labels)
    total = outcomes.always
    if plugin.routed:
        label_outcomes = outcomes
        if plugin.offset:
            unasked = outcomes.unconsulted
            if _depends_on_history(model, router.labels):
                unasked = _losses(model, frozen, features, row, states.unasked)
            total = total + unasked
        if router.cross_fit:
            fold_losses, label_outcomes = _fold_losses(params, frozen, features, plugin, router, model, row)
            total = total + fold_losses
        logits = router_logits(params, normalize_state(frozen, model, at_targets(row, row.states)))
        gain = label_outcomes.unconsulted - label_outcomes.consulted
        losses = router_losses(router, logits, gain)
        total = total + (jnp.where(_is_last_of_prompt(features), 0, losses) if plugin.edits == "all" else losses)
    return jnp.sum(features.weights * total), sum_tokens(token_metrics(outcomes, plugin.threshold), features.weights)


def _mixture_loss(
    frozen: Params, features: Features, plugin: PluginConfig, router: RouterConfig, model: Llama, states: States
) -> tuple[Float[Array, ""], Sums]:
    p, row = states.probability, states.row
    sigma = p > plugin.threshold
    share = p if router.objective == "soft" else p + jax.lax.stop_gradient(sigma.astype(p.dtype) - p)
    losses = _losses(model, frozen, features, row, mix(plugin.setting, row.states, states.g, share))
    usage = at_targets(row, sigma).astype(jnp.float32)
    values = {"base": features.base_loss, "combined": losses, "usage": usage}
    return jnp.sum(features.weights * losses), sum_tokens(values, features.weights)


def _fold_of(features: Features) -> Int[Array, "B 1"]:
    """Assigns each row to a fold; rows with the same target, such as phrasings of one question, stay together."""
    return jnp.sum(features.targets * features.weights.astype(jnp.int32), axis=1, keepdims=True) % FOLDS


def _fold_losses(
    params: Params,
    frozen: Params,
    features: Features,
    plugin: PluginConfig,
    router: RouterConfig,
    model: Llama,
    row: Row,
) -> tuple[Float[Array, "B R"], Outcomes]:
    """Computes each token's loss that trains the fold networks, and its outcomes by the network that has not seen the
    row."""

    def outcomes_of(side: Params) -> Outcomes:
        states = possible_states(plugin, model, {**params, "side": side}, frozen, features, row)
        return _outcomes(plugin, model, frozen, features, states, plugin.threshold, router.labels)

    outcomes = jax.lax.map(outcomes_of, params["folds"])
    fold = _fold_of(features)
    held_out = jax.tree.map(lambda leaf: jnp.where(fold == 0, leaf[0], leaf[1]), outcomes)
    return jnp.sum(outcomes.always, axis=0) - held_out.always, jax.lax.stop_gradient(held_out)
