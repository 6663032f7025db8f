"""Cost against quality of a router: the loss at every share of tokens for which the device is consulted."""

import numpy as np
from jaxtyping import Float


def loss_by_share(
    unconsulted: Float[np.ndarray, " N"], consulted: Float[np.ndarray, " N"], score: Float[np.ndarray, " N"]
) -> Float[np.ndarray, " N+1"]:
    """Computes the mean loss in nats when the device is asked for the 0, 1, ... N tokens with the largest scores.

    Args:
        unconsulted: loss of each token without the device, in nats.
        consulted: loss of each token with it.
        score: the order in which tokens are chosen; of equal scores the first.
    """
    order = np.argsort(-score, kind="stable")
    saved = np.concatenate([[0.0], np.cumsum((unconsulted - consulted)[order])])
    return (unconsulted.sum() - saved) / len(unconsulted)


def random_loss_by_share(
    unconsulted: Float[np.ndarray, " N"], consulted: Float[np.ndarray, " N"]
) -> Float[np.ndarray, " N+1"]:
    """Computes the expected loss when tokens are chosen at random: a straight line."""
    return np.linspace(unconsulted.mean(), consulted.mean(), len(unconsulted) + 1)


def gap_recovered(losses: Float[np.ndarray, " shares"]) -> float:
    """Averages over all shares how much of the gap between never and always asking is closed.

    This is the APGR of RouteLLM (Ong et al. 2024) with the loss for quality. Chance gives 0.5; above 1, asking less is
    better than always asking.

    Raises:
        ValueError: there is no gap.
    """
    gap = losses[0] - losses[-1]
    if gap == 0:
        raise ValueError("never asking and always asking lose the same: there is no gap to recover")
    recovered = (losses[0] - losses) / gap
    return float(np.trapezoid(recovered, dx=1 / (len(losses) - 1)))
