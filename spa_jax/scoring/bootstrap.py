"""Confidence intervals of means: percentile bootstrap (Efron 1979) over groups of rows, such as one story's."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Float


class Estimate(NamedTuple):
    """A mean with its confidence interval."""

    mean: float
    low: float
    high: float


def estimate(
    values: Sequence[float] | Float[np.ndarray, " N"],
    groups: Sequence[Hashable] | np.ndarray | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Estimates the mean of the values. For a paired comparison, pass the differences row by row.

    Args:
        values: one value for each row.
        groups: group of each row; groups are drawn as wholes, since their rows are alike. None: each row by itself.
        confidence: probability that the interval holds the mean.
        resamples: number of draws.
        seed: seed of the draws.

    Raises:
        ValueError: no values, or not as many groups as values.
    """
    rows = np.asarray(values, np.float64)
    names = list(range(len(rows))) if groups is None else list(groups)
    if not len(rows) or len(names) != len(rows):
        raise ValueError(f"{len(rows)} values and {len(names)} groups: there must be as many, and at least one")
    order = {name: index for index, name in enumerate(dict.fromkeys(names))}
    index = np.array([order[name] for name in names])
    sums, counts = np.bincount(index, rows), np.bincount(index).astype(np.float64)
    mean = float(rows.mean())
    if len(sums) == 1:  # nothing to draw among
        return Estimate(mean, -np.inf, np.inf)
    found = scipy.stats.bootstrap(
        (sums, counts), _ratio, paired=True, vectorized=True, n_resamples=resamples, confidence_level=confidence,
        method="percentile", rng=np.random.default_rng(seed), batch=max(1, 10**7 // len(sums)),
    )  # fmt: skip
    return Estimate(mean, float(found.confidence_interval.low), float(found.confidence_interval.high))


def _ratio(sums: np.ndarray, counts: np.ndarray, axis: int) -> np.ndarray:
    return np.asarray(sums.sum(axis=axis) / counts.sum(axis=axis))
