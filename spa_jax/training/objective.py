"""What is minimised: the side network on the always-on path, the router on where that path helps.

The `improvement` objective. Equation 3 of the paper, taken literally, trains sigma through its own hard decision and
saturates at "always ask" (DESIGN.md, trial 4). Here g is trained as if the device were always asked, and the router
learns the label "the plugin's loss on this token beats the base's by more than the margin".
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spa_jax.models.combine import always
from spa_jax.models.llama import Llama, Params
from spa_jax.models.plugin import PluginConfig, correction, router_logits
from spa_jax.models.router import CONSULT, consult
from spa_jax.training.features import Features
from spa_jax.training.vocabulary_loss import token_losses

Sums = dict[str, Float[Array, ""]]
"""Sums over target tokens, so that they add up over batches; `tokens` is their count."""


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """How the router learns.

    Attributes:
        margin: nats by which the plugin must beat the base for the label "ask the device".
        weighted: weigh each label by how far the gain is from the margin, which puts the mistakes where they cost
        least.
    """

    margin: float
    weighted: bool


def token_outcomes(
    plugin: PluginConfig, model: Llama, params: Params, frozen: Params, features: Features
) -> dict[str, Float[Array, "B R"]]:
    """Per target token: `base` (loss of f), `always` (with the device asked), `combined` (under sigma), `oracle` (the
    smaller one, what a perfect router reaches), all in nats, and `usage` (sigma as 0 or 1)."""
    g = correction(plugin, params, jnp.moveaxis(features.taps, 1, 0), model.dtype)
    asked = token_losses(model, frozen, always(plugin.setting, features.hidden, g), features.targets)
    if plugin.routed:
        sigma = consult(router_logits(params, features.hidden), plugin.threshold)
    else:
        sigma = jnp.ones(asked.shape, bool)
    return {
        "always": asked,
        "base": features.base_loss,
        "combined": jnp.where(sigma, asked, features.base_loss),
        "oracle": jnp.minimum(asked, features.base_loss),
        "usage": sigma.astype(jnp.float32),
    }


def router_losses(
    config: RouterConfig, logits: Float[Array, "B R 2"], gain: Float[Array, "B R"]
) -> Float[Array, "B R"]:
    """Cross-entropy of the label gain > margin; `gain` is base loss minus plugin loss in nats."""
    excess = jax.lax.stop_gradient(gain) - config.margin
    log_p = jax.nn.log_softmax(logits, axis=-1)
    losses = -jnp.where(excess > 0, log_p[..., CONSULT], log_p[..., 1 - CONSULT])
    return losses * jnp.abs(excess) if config.weighted else losses


def summed_loss(
    params: Params, frozen: Params, features: Features, *, plugin: PluginConfig, router: RouterConfig, model: Llama
) -> tuple[Float[Array, ""], Sums]:
    """The objective summed over target tokens, and the sums to report; gradients reach `params` alone."""
    outcomes = token_outcomes(plugin, model, params, frozen, features)
    total = outcomes["always"]
    if plugin.routed:
        logits = router_logits(params, features.hidden)
        total = total + router_losses(router, logits, features.base_loss - outcomes["always"])
    sums = {name: jnp.sum(features.weights * value) for name, value in outcomes.items()}
    return jnp.sum(features.weights * total), {**sums, "tokens": jnp.sum(features.weights)}


def means(sums: dict[str, float], setting: str) -> dict[str, float]:
    """Per-token metrics of summed outcomes, by the names in metrics.jsonl."""
    count = max(sums["tokens"], 1.0)
    names = {"base": "loss/base", "always": "loss/always", "combined": f"loss/{setting}", "oracle": "loss/oracle"}
    metrics = {key: sums[name] / count for name, key in names.items()}
    return {**metrics, "router/usage": sums["usage"] / count}
