"""What a router is worth at every share: cost against quality, whatever the threshold."""

import numpy as np
from jaxtyping import Float


def loss_by_share(
    skipped: Float[np.ndarray, " N"], asked: Float[np.ndarray, " N"], score: Float[np.ndarray, " N"]
) -> Float[np.ndarray, " N+1"]:
    """Mean loss in nats when the device is asked for the 0, 1, ... N tokens with the largest scores.

    Args:
        skipped: loss of each token without the device, nats.
        asked: with it.
        score: by which tokens are chosen; of equal ones the first.
    """
    order = np.argsort(-score, kind="stable")
    saved = np.concatenate([[0.0], np.cumsum((skipped - asked)[order])])
    return (skipped.sum() - saved) / len(skipped)


def random_loss_by_share(skipped: Float[np.ndarray, " N"], asked: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N+1"]:
    """What choosing at random comes to in the mean: a straight line."""
    return np.linspace(skipped.mean(), asked.mean(), len(skipped) + 1)


def gap_recovered(losses: Float[np.ndarray, " N+1"]) -> float:
    """The share of the gap between never and always asking that is closed, averaged over all shares: the APGR of
    RouteLLM (Ong et al. 2024) with loss for quality. 0.5 is chance, and above 1 asking less is better than always.

    Raises:
        ValueError: there is no gap.
    """
    gap = losses[0] - losses[-1]
    if gap == 0:
        raise ValueError("never asking and always asking lose the same: there is no gap to recover")
    recovered = (losses[0] - losses) / gap
    return float(np.trapezoid(recovered, dx=1 / (len(losses) - 1)))
