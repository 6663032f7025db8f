"""Measurement of trained parameters on held-out examples."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from spa_jax.data.encoding import Example
from spa_jax.data.pipeline import plan_batches
from spa_jax.models.llama import Params
from spa_jax.training.config import TapCacheConfig
from spa_jax.training.outcomes import Outcomes, mean_metrics, sum_tokens, threshold_for, token_metrics
from spa_jax.training.recipe import Recipe
from spa_jax.training.sources import Source, load_batches
from spa_jax.training.step import eval_step
from spa_jax.weights.backbone import Backbone

USER_TAP_CACHE = TapCacheConfig()
"""The tap cache in the user's cache directory, for measurements that belong to no run."""


class Scorer:
    """Measures parameters of a method on a fixed set of examples, over which the backbone runs once."""

    def __init__(
        self,
        backbone: Backbone,
        recipe: Recipe,
        examples: Sequence[Example],
        batch_size: int,
        tap_cache: TapCacheConfig = USER_TAP_CACHE,
        source: Source | None = None,
    ) -> None:
        """Runs the backbone over the examples of which nothing is kept yet.

        Args:
            backbone: the frozen model.
            recipe: what is measured; see `spa_jax.training.methods`.
            examples: held out.
            batch_size: B.
            tap_cache: where features are kept.
            source: the recipe's source of scoring batches, where it is open and filled already.

        Raises:
            UserError: the tap cache cannot be used.
        """
        self.model = recipe.model(backbone)
        self._backbone, self._recipe, self._examples, self._batch_size = backbone, recipe, examples, batch_size
        if source is None:
            _, source = recipe.sources(backbone, self.model, tap_cache, batch_size, examples)
            source.fill(examples)
        self._source = source

    def per_token(self, program: Callable[[Params, Params, Any], tuple[Any, Array]], params: Params) -> Any:
        """Runs a program over all batches.

        Args:
            program: jitted, (params, frozen, batch) -> (pytree of `[B,R]`, weights `[B,R]`).
            params: the trained parameters.

        Returns:
            The pytree with flat NumPy arrays of all target tokens, in the order of `plan_batches`.
        """
        partitioner, batches = self.model.partitioner, plan_batches(self._examples, self._batch_size)
        loaded = load_batches(batches, partitioner, self._source.collate, self._examples)
        frozen = self._backbone.params
        results = jax.device_get([program(params, frozen, partitioner.shard_batch(batch)) for _, batch in loaded])
        tokens = [jax.tree.map(lambda leaf, w=weights: np.asarray(leaf)[w > 0], values) for values, weights in results]
        return jax.tree.map(lambda *pieces: np.concatenate(pieces), *tokens)

    def outcomes(self, params: Params, threshold: float | None = None) -> Outcomes:
        """Computes the outcomes of all target tokens, as flat NumPy arrays, under a router's threshold, by default the
        method's own."""
        threshold = self._recipe.method.threshold if threshold is None else threshold
        return self.per_token(lambda *args: eval_step(self._recipe, self.model, *args, np.float32(threshold)), params)

    def examples_of_tokens(self) -> Int[np.ndarray, " M"]:
        """Returns the index of the example of each token of `outcomes`, in their order."""
        rows = [row for batch in plan_batches(self._examples, self._batch_size) for row in batch if row >= 0]
        return np.repeat(rows, [len(self._examples[row].targets) for row in rows])

    def outcomes_within(self, params: Params, budget: float) -> tuple[Outcomes, float]:
        """Computes the outcomes, and the threshold they are under: the method's own, or with a budget above 0 the one
        at which that share of the target tokens is asked for."""
        outcomes = self.outcomes(params)
        return self.at_budget(params, outcomes, budget) if budget else (outcomes, self._recipe.method.threshold)

    def at_budget(self, params: Params, outcomes: Outcomes, budget: float) -> tuple[Outcomes, float]:
        """Returns the outcomes under the threshold at which a share `budget` of the target tokens is asked for, and
        that threshold; at `head`, where outcomes depend on none, they are those given."""
        threshold = threshold_for(outcomes.probability, budget)
        return outcomes if self._recipe.method.entry == "head" else self.outcomes(params, threshold), threshold

    def metrics(self, outcomes: Outcomes, threshold: float, setting: str = "") -> dict[str, float]:
        """Averages outcomes to `loss/...` in nats and `router/usage`, per target token.

        Args:
            outcomes: of these examples.
            threshold: the device is asked where p(consult) is above it; in front of an inner block, the one that the
                outcomes were computed under.
            setting: for the name of the loss under the router; by default that of the method.
        """
        sums = sum_tokens(token_metrics(outcomes, threshold), jnp.ones(len(outcomes.base)))
        return mean_metrics(
            {name: float(value) for name, value in sums.items()}, setting or self._recipe.method.setting
        )
