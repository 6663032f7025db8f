"""Losses of single target tokens with and without the device, and the metrics that are their means.

Shape letters: B rows of a batch, R target tokens of a row.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Sums = dict[str, Float[Array, ""]]
"""Sums over target tokens, so that they add up over batches; `tokens` is the number of tokens."""

METRICS = {
    "base": "loss/base",
    "consulted": "loss/always",
    "combined": "loss/{setting}",
    "oracle": "loss/oracle",
    "usage": "router/usage",
}
"""Name of a sum -> name of its mean in metrics.jsonl and summary.json."""


class Outcomes(NamedTuple):
    """Cross-entropy of each target token in nats, with and without the device, and what the router says of it.

    In front of an inner block a correction reaches later tokens too. There `unconsulted` and `consulted` are the losses
    of a token after a history in which the device was asked as the router says, so they belong to one threshold: one is
    what happens, and the other what would, had the router decided otherwise at this token alone.
    """

    base: Float[Array, "B R"]
    """Loss of the backbone alone."""
    always: Float[Array, "B R"]
    """Loss where the device is asked for this token and all before it."""
    unconsulted: Float[Array, "B R"]
    """Loss where the device is not asked for this token."""
    consulted: Float[Array, "B R"]
    """Loss where the device is asked for this token."""
    probability: Float[Array, "B R"]
    """p(consult); 1 in a setting without a router."""


def token_metrics(outcomes: Outcomes, threshold: float) -> dict[str, Float[Array | np.ndarray, "*M"]]:
    """Computes the metrics of single tokens for a router's threshold.

    Returns:
        In nats `base`, `consulted` (the loss where the device is always asked), `combined` (the loss under sigma) and
        `oracle` (the smaller of the losses with and without the device for this token), and `usage` (sigma as 0 or 1).
    """
    sigma = outcomes.probability > threshold
    return {
        "base": outcomes.base,
        "consulted": outcomes.always,
        "combined": jnp.where(sigma, outcomes.consulted, outcomes.unconsulted),
        "oracle": jnp.minimum(outcomes.consulted, outcomes.unconsulted),
        "usage": sigma.astype(jnp.float32),
    }


def sum_tokens(values: Mapping[str, Float[Array | np.ndarray, "*M"]], weights: Float[Array, "*M"]) -> Sums:
    """Sums each value over target tokens, which have weight 1, and counts the tokens."""
    return {**{name: jnp.sum(weights * value) for name, value in values.items()}, "tokens": jnp.sum(weights)}


def mean_metrics(sums: dict[str, float], setting: str) -> dict[str, float]:
    """Divides sums by their number of tokens; the names are those in metrics.jsonl."""
    count = max(sums["tokens"], 1.0)
    return {name.format(setting=setting): sums[key] / count for key, name in METRICS.items() if key in sums}


def threshold_for(probability: Float[Array, " M"] | Float[np.ndarray, " M"], budget: float) -> float:
    """Finds a threshold that at most a share `budget` of the probabilities exceed, as many as possible.

    It lies midway between two of them, so that the rounding of another program moves none across.
    """
    ranked = np.concatenate([[1.0], np.sort(np.asarray(probability))[::-1], [0.0]])
    count = int(budget * len(probability))
    return float(ranked[count : count + 2].mean())
