"""What a plugin is worth on held-out examples."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from spa_jax.data.encoding import Example
from spa_jax.data.pipeline import plan_batches, prefetched
from spa_jax.models.llama import Params
from spa_jax.training.objective import Outcomes, means, per_token, sums


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Token outcomes over a fixed set of examples.

    Attributes:
        step: of `make_eval_step`.
        frozen: the backbone.
        examples: held out.
        collate: makes a batch of rows of them.
        batch_size: B.
        setting: of the plugin, for the names of metrics.
        threshold: the device is asked where p(consult) is above it; with a budget, what counts is the budget.
        budget: largest share of tokens for which the device is asked; 0 for none.
    """

    step: Callable[[Params, Params, Any], tuple[Outcomes, jax.Array]]
    frozen: Params
    examples: Sequence[Example]
    collate: Callable[[Sequence[Example], np.ndarray], Any]
    batch_size: int
    setting: str
    threshold: float
    budget: float = 0.0

    def outcomes(self, params: Params) -> Outcomes:
        """The outcomes of all held-out target tokens, as flat NumPy arrays."""
        batches = plan_batches(self.examples, self.batch_size).map(lambda rows: self.collate(self.examples, rows))
        parts = jax.device_get([self.step(params, self.frozen, batch) for batch in prefetched(batches)])
        leaves: list[Any] = [np.concatenate(pieces) for pieces in zip(*(_flat(*part) for part in parts))]
        return Outcomes(*leaves)

    def __call__(self, params: Params) -> dict[str, float]:
        """Metrics `loss/...` in nats and `router/usage`, per target token."""
        outcomes = self.outcomes(params)
        values = per_token(outcomes, self.threshold_of(outcomes))
        summed = sums(values, jnp.ones(len(outcomes.base)))
        return means({name: float(value) for name, value in summed.items()}, self.setting)

    def threshold_of(self, outcomes: Outcomes) -> float:
        """The threshold in force: the lowest that keeps within the budget on these tokens, where there is one."""
        return threshold_for(np.asarray(outcomes.probability), self.budget) if self.budget else self.threshold


def threshold_for(probability: Float[np.ndarray, " M"], budget: float) -> float:
    """A threshold that at most `budget` of the probabilities are above, as many as possible: midway between two, so
    that the rounding of another program moves none across."""
    ranked = np.concatenate([[1.0], np.sort(probability)[::-1], [0.0]])
    count = int(budget * len(probability))
    return float(ranked[count : count + 2].mean())


def _flat(outcomes: Outcomes, weights: np.ndarray) -> list[np.ndarray]:
    return [np.asarray(leaf)[weights > 0] for leaf in outcomes]
